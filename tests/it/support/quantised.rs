//! A model directory's weights and tokenizer as a GGUF file with block-quantised linears.

use std::{collections::HashMap, fs::File, path::Path};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
    safetensors,
};

use super::tiny::{SPECIALS, TEMPLATE, Tiny, byte_chars};

const NAMES: [(&str, &str); 12] = [
    ("model.layers.", "blk."),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
];

/// Writes `tiny` to `path`, linears as `dtype`, the embedding as Q8_0, norms as F32.
pub fn write(tiny: &Tiny, path: &Path, dtype: GgmlDType) {
    let dir = tempfile::tempdir().unwrap();
    tiny.write(dir.path());
    let tensors: HashMap<String, Tensor> =
        safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let mut tensors: Vec<(String, QTensor)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let short = NAMES.iter().fold(name.clone(), |name, (from, to)| name.replace(from, to));
            let dtype = match tensor.rank() {
                1 => GgmlDType::F32,
                _ if short.starts_with("token_embd") => GgmlDType::Q8_0,
                _ => dtype,
            };
            (short, QTensor::quantize(tensor, dtype).unwrap())
        })
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let number = |n: usize| gguf_file::Value::U32(n as u32);
    let word = |text: &str| gguf_file::Value::String(text.into());
    let bytes = byte_chars();
    let tokens = bytes.iter().map(|c| word(&c.to_string())).chain(SPECIALS.map(word)).collect();
    let kinds = bytes.iter().map(|_| 1).chain(SPECIALS.map(|_| 3)).map(gguf_file::Value::I32).collect();
    let metadata = [
        ("general.architecture", gguf_file::Value::String("llama".into())),
        ("llama.embedding_length", number(tiny.hidden)),
        ("llama.feed_forward_length", number(tiny.intermediate)),
        ("llama.block_count", number(tiny.layers)),
        ("llama.attention.head_count", number(tiny.heads)),
        ("llama.attention.head_count_kv", number(tiny.kv_heads)),
        ("llama.attention.key_length", number(tiny.head_dim)),
        ("llama.context_length", number(tiny.context)),
        ("llama.attention.layer_norm_rms_epsilon", gguf_file::Value::F32(1e-5)),
        ("tokenizer.ggml.model", word("gpt2")),
        ("tokenizer.ggml.tokens", gguf_file::Value::Array(tokens)),
        ("tokenizer.ggml.token_type", gguf_file::Value::Array(kinds)),
        ("tokenizer.ggml.merges", gguf_file::Value::Array(Vec::new())),
        ("tokenizer.ggml.bos_token_id", number(256)),
        ("tokenizer.ggml.eos_token_id", number(258)),
        ("tokenizer.ggml.add_bos_token", gguf_file::Value::Bool(false)),
        ("tokenizer.chat_template", word(TEMPLATE)),
    ];
    let metadata: Vec<(&str, &gguf_file::Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}
