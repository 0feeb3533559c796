//! The files of PEFT's prompt learning: a few common keys, and one tensor without a prefix, `prompt_embeddings`.

use serde_json::{Map, Value, json};

use crate::{
    domain::BaseInfo,
    methods::{
        AdapterFiles, MethodError,
        config::{only, refuse},
        file::{self, field},
    },
};

pub const TENSOR: &str = "prompt_embeddings";

/// The shape of the rows, and how PEFT's config tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// `num_virtual_tokens`
    pub tokens: usize,
    /// Numbers of one row.
    pub width: usize,
    /// `num_layers`
    pub layers: usize,
    /// `num_attention_heads`: for prefixes those of the keys.
    pub heads: usize,
    /// `token_dim`: the embedding's width, for prefixes that of the keys.
    pub token_dim: usize,
}

impl Layout {
    /// Rows that stand for token embeddings.
    pub fn embeddings(tokens: usize, base: &BaseInfo) -> Self {
        Self { tokens, width: base.hidden, layers: base.layers, heads: base.heads, token_dim: base.hidden }
    }

    pub fn shape(&self) -> (usize, usize) {
        (self.tokens, self.width)
    }

    /// The file's rows, after its config was found to speak of this shape.
    pub fn read(&self, files: &AdapterFiles) -> Result<Vec<f32>, MethodError> {
        self.check(&file::config(files)?)?;
        let expected = [(TENSOR.to_owned(), vec![self.tokens, self.width])];
        Ok(file::tensors(&files.weights, &expected)?.swap_remove(0))
    }

    pub fn write(&self, values: Vec<f32>) -> Vec<u8> {
        file::tensor_bytes(&[(TENSOR.to_owned(), vec![self.tokens, self.width], values)])
    }

    /// `adapter_config.json` with a method's own keys.
    pub fn config<const N: usize>(&self, peft_type: &str, base: &BaseInfo, own: [(&'static str, Value); N]) -> Vec<u8> {
        let common = [
            ("base_model_name_or_path", json!(base.id)),
            ("inference_mode", json!(true)),
            ("modules_to_save", Value::Null),
            ("num_attention_heads", json!(self.heads)),
            ("num_layers", json!(self.layers)),
            ("num_transformer_submodules", json!(1)),
            ("num_virtual_tokens", json!(self.tokens)),
            ("peft_type", json!(peft_type)),
            ("revision", Value::Null),
            ("task_type", json!("CAUSAL_LM")),
            ("token_dim", json!(self.token_dim)),
        ];
        file::config_bytes(&common.into_iter().chain(own).collect())
    }

    /// What the config says of the base must be so.
    fn check(&self, config: &Map<String, Value>) -> Result<(), MethodError> {
        let is_prefix = self.width != self.token_dim;
        let keys = [("token_dim", self.token_dim), ("num_layers", self.layers), ("num_attention_heads", self.heads)];
        // The heads say nothing of embeddings.
        for (key, here) in &keys[..if is_prefix { 3 } else { 2 }] {
            let Some(there) = field::<usize>(config, key)?.filter(|there| there != here) else { continue };
            let hint = match *key {
                "num_layers" => "",
                _ if is_prefix => " (of the base's keys; old versions of PEFT wrote that of its queries)",
                _ => " (of the base's embeddings)",
            };
            return Err(MethodError::Mismatch(format!("adapter_config.json: {key} is {there}, not {here}{hint}")));
        }
        Ok(())
    }
}

/// `num_virtual_tokens`, after keys that we lack were refused by name.
pub fn tokens(config: &Map<String, Value>) -> Result<usize, MethodError> {
    refuse(config, &["modules_to_save"])?;
    only(config, "task_type", "CAUSAL_LM")?;
    // Two are those of an encoder and a decoder.
    if let Some(n) = field::<usize>(config, "num_transformer_submodules")?.filter(|n| *n != 1) {
        let message = format!("adapter_config.json: num_transformer_submodules {n} is not supported");
        return Err(MethodError::Unsupported(message));
    }
    let tokens = field(config, "num_virtual_tokens")?;
    tokens.ok_or_else(|| MethodError::Mismatch("adapter_config.json: num_virtual_tokens is missing".into()))
}
