//! UniPELT's `adapter_config.json`: a format of our own, since PEFT has none.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{
    domain::{BaseInfo, UnipeltSpec},
    methods::{MethodError, config::only, file::field},
};

pub fn write(spec: &UnipeltSpec, base: &BaseInfo) -> BTreeMap<&'static str, Value> {
    BTreeMap::from([
        ("base_model_name_or_path", json!(base.id)),
        ("bottleneck_size", json!(spec.bottleneck_size)),
        ("gate_mode", json!(spec.gate_mode)),
        ("lora_r", json!(spec.lora_r)),
        ("non_linearity", json!("relu")),
        ("peft_type", json!("UNIPELT")),
        ("prefix_length", json!(spec.prefix_length)),
        ("reduction_factor", json!(spec.reduction_factor)),
        ("task_type", json!("CAUSAL_LM")),
    ])
}

/// The spec that the config stands for.
pub fn read(config: &Map<String, Value>) -> Result<UnipeltSpec, MethodError> {
    only(config, "task_type", "CAUSAL_LM")?;
    only(config, "non_linearity", "relu")?;
    let missing = |key: &str| MethodError::Mismatch(format!("adapter_config.json: {key} is missing"));
    let number = |key: &str| field::<usize>(config, key)?.ok_or_else(|| missing(key));
    Ok(UnipeltSpec {
        lora_r: number("lora_r")?,
        prefix_length: number("prefix_length")?,
        bottleneck_size: number("bottleneck_size")?,
        reduction_factor: number("reduction_factor")?,
        gate_mode: field(config, "gate_mode")?.unwrap_or_default(),
    })
}
