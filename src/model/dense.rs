//! The base as a Hugging Face directory has it: config.json, and every tensor by its name, in F32.

use candle_core::{Device, Result, Tensor};
use serde_json::{Value, json};

use super::{Base, Linear, config::ModelConfig};
use crate::{
    domain::{Norm, Site},
    formats::gguf::Gguf,
};

/// Families whose tensors are just those of `Layer`.
pub(super) const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// config.json of a GGUF's model, or why there is none.
pub fn config_of_gguf(gguf: &Gguf, config: &ModelConfig, vocab: usize) -> std::result::Result<Value, String> {
    if gguf.tensor("rope_freqs.weight").is_some() {
        return Err("its rope factors have no form in config.json".to_owned());
    }
    let family = config.architecture.as_str();
    let architecture = match family {
        "llama" => "LlamaForCausalLM",
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => return Err(format!("the family {family} cannot be written as a directory yet")),
    };
    let number = |key: &str| gguf.f64(&format!("{family}.{key}"));
    let mut json = json!({
        "architectures": [architecture], "model_type": family, "vocab_size": vocab, "hidden_act": "silu",
        "hidden_size": config.hidden, "intermediate_size": config.intermediate, "num_hidden_layers": config.layers(),
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": config.context, "rms_norm_eps": config.eps,
        "rope_theta": number("rope.freq_base").unwrap_or(10_000.0),
    });
    if gguf.str(&format!("{family}.rope.scaling.type")) == Some("linear") {
        json["rope_scaling"] = json!({"rope_type": "linear", "factor": number("rope.scaling.factor").unwrap_or(1.0)});
    }
    if let Some(window) = gguf.u64(&format!("{family}.attention.sliding_window")).filter(|window| *window > 0) {
        json["sliding_window"] = json!(window);
        json["use_sliding_window"] = json!(true);
    }
    for key in ["bos_token_id", "eos_token_id"] {
        if let Some(id) = gguf.u64(&format!("tokenizer.ggml.{key}")) {
            json[key] = json!(id);
        }
    }
    Ok(json)
}

impl Base {
    /// config.json for the tensors of `dense_tensors`, in F32, or why the model cannot be written.
    pub fn dense_config(&self, tied: bool) -> std::result::Result<Value, String> {
        if !FAMILIES.contains(&self.info.architecture.as_str()) {
            return Err(format!("the family {} cannot be written as a directory yet", self.info.architecture));
        }
        let mut json = self.config_json.as_ref().clone()?;
        if let Some(fields) = json.as_object_mut() {
            fields.shift_remove("quantization_config");
            fields.shift_remove("torch_dtype");
        }
        json["dtype"] = json!("float32");
        json["tie_word_embeddings"] = json!(tied);
        Ok(json)
    }

    /// Gives every tensor to `f`, by its Hugging Face name and as F32, one at a time. The output layer is the last,
    /// also where it is the embedding.
    pub fn dense_tensors<E: From<candle_core::Error>>(
        &self,
        mut f: impl FnMut(String, Tensor) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let vector = |values: &[f32]| Tensor::new(values, &Device::Cpu);
        let weight = |path: &str| format!("{path}.weight");
        let vocabulary: Vec<u32> = (0..self.info.vocab as u32).collect();
        f(weight(Site::Embed.module()), self.embed(&vocabulary)?)?;
        for (i, layer) in self.layers.iter().enumerate() {
            for norm in [Norm::Attention(i), Norm::Mlp(i)] {
                f(weight(&norm.path()), vector(self.norm(norm))?)?;
            }
            for site in Site::LAYER {
                self.dense_linear(&site.path(i), layer.linear(site), &mut f)?;
            }
            for (name, norm) in [("q_norm", &layer.q_norm), ("k_norm", &layer.k_norm)] {
                if let Some(norm) = norm {
                    f(weight(&format!("model.layers.{i}.self_attn.{name}")), vector(norm)?)?;
                }
            }
        }
        f(weight(&Norm::Final.path()), vector(self.norm(Norm::Final))?)?;
        self.dense_linear(Site::Head.module(), self.linear(0, Site::Head), &mut f)
    }

    fn dense_linear<E: From<candle_core::Error>>(
        &self,
        path: &str,
        linear: &Linear,
        f: &mut impl FnMut(String, Tensor) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        f(format!("{path}.weight"), linear.dequantize()?)?;
        match linear.bias() {
            Some(bias) => f(format!("{path}.bias"), bias_tensor(bias)?),
            None => Ok(()),
        }
    }
}

fn bias_tensor(bias: &[f32]) -> Result<Tensor> {
    Tensor::new(bias, &Device::Cpu)
}
