//! Small random models in Hugging Face layout, made from a seed.

use std::{fs, path::Path};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// What the model looks like. Widths are multiples of 32, so that every block format fits.
#[derive(Clone, Debug)]
pub struct Tiny {
    pub seed: u64,
    /// `model_type` in config.json.
    pub model_type: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context: usize,
    pub tied: bool,
    /// Added to config.json, replacing what is there.
    pub extra: Value,
}

impl Default for Tiny {
    fn default() -> Self {
        Self {
            seed: 1,
            model_type: "llama",
            hidden: 64,
            intermediate: 96,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            context: 512,
            tied: true,
            extra: json!({}),
        }
    }
}

/// 256 byte tokens, then these.
pub const SPECIALS: [&str; 4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"];
/// Their chat template.
pub const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}\
                            <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
pub const VOCAB: usize = 256 + SPECIALS.len();

impl Tiny {
    /// Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json into `dir`.
    pub fn write(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": self.model_type, "vocab_size": VOCAB,
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "max_position_embeddings": self.context, "tie_word_embeddings": self.tied, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 256, "eos_token_id": 258,
        });
        for (key, value) in self.extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        fs::write(dir.join("tokenizer.json"), tokenizer().to_string()).unwrap();
        fs::write(dir.join("tokenizer_config.json"), tokenizer_config().to_string()).unwrap();
        let tensors = self.tensors();
        let views = tensors
            .iter()
            .map(|(name, shape, data)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    }

    /// `(name, shape, little-endian f32 bytes)`
    fn tensors(&self) -> Vec<(String, Vec<usize>, Vec<u8>)> {
        let (h, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut random = Random(self.seed);
        let mut all = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, around: f32, std: f32| {
            let n: usize = shape.iter().product();
            let data = (0..n).flat_map(|_| (around + std * random.normal()).to_le_bytes()).collect();
            all.push((name, shape, data));
        };
        add("model.embed_tokens.weight".into(), vec![VOCAB, h], 0.0, 0.5);
        for layer in 0..self.layers {
            let name = |module: &str| format!("model.layers.{layer}.{module}");
            let linears = match self.model_type {
                "phi3" => vec![
                    ("self_attn.qkv_proj", q + 2 * kv, h),
                    ("self_attn.o_proj", h, q),
                    ("mlp.gate_up_proj", 2 * self.intermediate, h),
                    ("mlp.down_proj", h, self.intermediate),
                ],
                _ => vec![
                    ("self_attn.q_proj", q, h),
                    ("self_attn.k_proj", kv, h),
                    ("self_attn.v_proj", kv, h),
                    ("self_attn.o_proj", h, q),
                    ("mlp.gate_proj", self.intermediate, h),
                    ("mlp.up_proj", self.intermediate, h),
                    ("mlp.down_proj", h, self.intermediate),
                ],
            };
            // Gemma's are stored around 0, and stand behind the two blocks too.
            let is_gemma = self.model_type == "gemma3_text";
            let middle = if is_gemma { 0.0 } else { 1.0 };
            for (module, out, input) in linears {
                add(name(&format!("{module}.weight")), vec![out, input], 0.0, 1.5 / (input as f32).sqrt());
            }
            if self.model_type == "qwen2" {
                for (module, out) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                    add(name(&format!("self_attn.{module}.bias")), vec![out], 0.0, 0.3);
                }
            }
            if self.model_type == "qwen3" || is_gemma {
                for norm in ["q_norm", "k_norm"] {
                    add(name(&format!("self_attn.{norm}.weight")), vec![self.head_dim], middle, 0.2);
                }
            }
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(name(&format!("{norm}.weight")), vec![h], middle, 0.2);
            }
            for norm in ["pre_feedforward_layernorm", "post_feedforward_layernorm"].iter().filter(|_| is_gemma) {
                add(name(&format!("{norm}.weight")), vec![h], middle, 0.2);
            }
        }
        add("model.norm.weight".into(), vec![h], 1.0, 0.2);
        if !self.tied {
            add("lm_head.weight".into(), vec![VOCAB, h], 0.0, 0.3);
        }
        all
    }
}

/// SplitMix64; normal by the sum of twelve uniform numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// `[0, 1)`
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// GPT-2's printable stand-in for each byte.
pub fn byte_chars() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    (0..256u32)
        .map(|b| {
            let code = if printable(b) {
                b
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap()
        })
        .collect()
}

fn tokenizer() -> Value {
    let chars = byte_chars();
    let vocab: serde_json::Map<String, Value> =
        chars.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let added: Vec<Value> = (SPECIALS.iter().enumerate())
        .map(|(i, content)| {
            json!({"id": 256 + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

fn tokenizer_config() -> Value {
    json!({
        "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>", "add_bos_token": false,
        "chat_template": TEMPLATE,
    })
}
