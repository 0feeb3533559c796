//! `adapter_config.json` of a mixture: MixLoRA's keys, and all of our knobs beside them.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{
    domain::{BaseInfo, MoeLoraSpec, spec::MoeVariant},
    methods::{
        MethodError,
        config::{modules, only, refuse},
        file::{field, number},
    },
};

/// Keys that change the arithmetic: refused by name when they say anything.
const REFUSED: [&str; 6] =
    ["use_dora", "use_rslora", "expert_lora", "modules_to_save", "fan_in_fan_out", "router_loss_z"];

pub fn variant(peft_type: &str) -> Option<MoeVariant> {
    use MoeVariant::*;
    [MixLora, Mola, LoraMoe, AdaMole].into_iter().find(|variant| variant.name().to_uppercase() == peft_type)
}

/// Where the router looks, and how it selects: what the type says, for other readers.
fn words(variant: MoeVariant) -> [(&'static str, &'static str); 3] {
    let (scope, selection) = match variant {
        MoeVariant::MixLora => ("ffn", "topk"),
        MoeVariant::Mola => ("linear", "topk"),
        MoeVariant::LoraMoe => ("linear", "dense"),
        MoeVariant::AdaMole => ("linear", "threshold"),
    };
    [("routing_strategy", variant.name()), ("gate_scope", scope), ("selection", selection)]
}

pub fn write(spec: &MoeLoraSpec, base: &BaseInfo) -> BTreeMap<&'static str, Value> {
    let mut config = BTreeMap::from([
        ("act_fn", json!("silu")),
        ("base_model_name_or_path", json!(base.id)),
        ("bias", json!("none")),
        ("blc_alpha", json!(spec.blc_alpha)),
        ("blc_weight", json!(spec.blc_weight)),
        ("experts_per_layer", json!(spec.experts_per_layer)),
        ("jitter_noise", json!(spec.jitter_noise)),
        ("lora_alpha", number(spec.lora_alpha)),
        ("lora_dropout", json!(spec.lora_dropout)),
        ("max_threshold", json!(spec.max_threshold)),
        ("num_experts", json!(spec.num_experts)),
        ("peft_type", json!(spec.variant.name().to_uppercase())),
        ("r", json!(spec.r)),
        ("router_aux_loss_coef", json!(spec.router_aux_loss_coef)),
        ("router_init_range", json!(spec.router_init_range)),
        ("target_modules", modules(&spec.chosen())),
        ("task_type", json!("CAUSAL_LM")),
        ("top_k", json!(spec.top_k)),
        ("use_dora", json!(false)),
        ("use_rslora", json!(false)),
    ]);
    config.extend(words(spec.variant).map(|(key, value)| (key, json!(value))));
    config
}

/// The spec that the config stands for.
pub fn read(variant: MoeVariant, config: &Map<String, Value>) -> Result<MoeLoraSpec, MethodError> {
    refuse(config, &REFUSED)?;
    let fixed = [("bias", "none"), ("act_fn", "silu"), ("task_type", "CAUSAL_LM")];
    fixed.into_iter().chain(words(variant)).try_for_each(|(key, value)| only(config, key, value))?;
    let mut spec = MoeLoraSpec {
        variant,
        num_experts: field(config, "num_experts")?,
        experts_per_layer: field(config, "experts_per_layer")?,
        top_k: field(config, "top_k")?,
        lora_dropout: field(config, "lora_dropout")?.unwrap_or(0.0),
        target_modules: field(config, "target_modules")?,
        router_aux_loss_coef: field(config, "router_aux_loss_coef")?,
        router_init_range: field(config, "router_init_range")?,
        jitter_noise: field(config, "jitter_noise")?.unwrap_or(0.0),
        max_threshold: field(config, "max_threshold")?,
        blc_weight: field(config, "blc_weight")?,
        blc_alpha: field(config, "blc_alpha")?,
        ..MoeLoraSpec::default()
    };
    spec.r = field(config, "r")?.unwrap_or(spec.r);
    spec.lora_alpha = field(config, "lora_alpha")?.unwrap_or(spec.lora_alpha);
    Ok(spec.resolved())
}
