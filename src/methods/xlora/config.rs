//! X-LoRA's `adapter_config.json`, in PEFT's words; the experts' own stand in it under `experts`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{
    domain::{BaseInfo, XloraSpec, spec::XloraExpert},
    methods::{
        MethodError,
        config::only,
        file::{field, number},
        lora,
    },
};

pub fn write(spec: &XloraSpec, base: &BaseInfo) -> BTreeMap<&'static str, Value> {
    let folder = |i: usize| (i.to_string(), json!(i.to_string()));
    BTreeMap::from([
        ("adapters", Value::Object((0..spec.experts.len()).map(folder).collect())),
        ("base_model_name_or_path", json!(base.id)),
        ("enable_softmax", json!(spec.enable_softmax)),
        ("enable_softmax_topk", json!(spec.enable_softmax_topk)),
        ("experts", spec.experts.iter().map(|expert| json!(lora::config::write(&expert.lora, base))).collect()),
        ("global_scaling_weight", number(spec.global_scaling_weight)),
        ("hidden_size", json!(base.hidden)),
        ("inference_mode", json!(true)),
        ("layerwise_scalings", json!(spec.layerwise_scalings)),
        ("peft_type", json!("XLORA")),
        ("scaling_pass_value", number(spec.scaling_pass_value)),
        ("softmax_temperature", number(spec.softmax_temperature)),
        ("task_type", json!("CAUSAL_LM")),
        ("top_k_lora", json!(spec.top_k_lora)),
        ("use_trainable_adapters", json!(spec.use_trainable_adapters)),
        ("xlora_depth", json!(spec.xlora_depth)),
        ("xlora_dropout_p", json!(spec.xlora_dropout_p)),
        ("xlora_size", json!(spec.xlora_size)),
    ])
}

/// The spec that the config stands for. PEFT calls the experts by their place, whatever they are called here.
pub fn read(config: &Map<String, Value>) -> Result<XloraSpec, MethodError> {
    only(config, "task_type", "CAUSAL_LM")?;
    let experts: Vec<Map<String, Value>> = field(config, "experts")?.unwrap_or_default();
    if experts.is_empty() {
        let message = "the experts of this XLORA adapter are not there: they lie in directories called 0, 1, …";
        return Err(MethodError::Mismatch(message.into()));
    }
    let expert = |config| Ok(XloraExpert { generation: None, lora: lora::config::read(config)? });
    let defaults = XloraSpec::default();
    Ok(XloraSpec {
        adapters: (0..experts.len()).map(|i| i.to_string()).collect(),
        experts: experts.iter().map(expert).collect::<Result<_, MethodError>>()?,
        enable_softmax: field(config, "enable_softmax")?.unwrap_or(defaults.enable_softmax),
        enable_softmax_topk: field(config, "enable_softmax_topk")?.unwrap_or(defaults.enable_softmax_topk),
        softmax_temperature: field(config, "softmax_temperature")?.unwrap_or(defaults.softmax_temperature),
        layerwise_scalings: field(config, "layerwise_scalings")?.unwrap_or(defaults.layerwise_scalings),
        top_k_lora: field(config, "top_k_lora")?,
        xlora_depth: field(config, "xlora_depth")?.unwrap_or(defaults.xlora_depth),
        xlora_size: field(config, "xlora_size")?.unwrap_or(defaults.xlora_size),
        xlora_dropout_p: field(config, "xlora_dropout_p")?.unwrap_or(defaults.xlora_dropout_p),
        use_trainable_adapters: field(config, "use_trainable_adapters")?.unwrap_or(defaults.use_trainable_adapters),
        scaling_pass_value: field(config, "scaling_pass_value")?.unwrap_or(defaults.scaling_pass_value),
        global_scaling_weight: field(config, "global_scaling_weight")?.unwrap_or(defaults.global_scaling_weight),
    })
}
