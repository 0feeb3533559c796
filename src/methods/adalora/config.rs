//! AdaLoRA's `adapter_config.json`, in PEFT's words.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::Module;
use crate::{
    domain::{
        AdaLoraSpec, BaseInfo,
        spec::{Budget, Targets},
    },
    methods::{
        MethodError,
        config::{layers, layers_pattern, modules, only, refuse},
        file::{field, number},
    },
};

/// Keys that change the arithmetic or the base when they say anything: refused by name. PEFT's AdaLoRA itself ignores
/// `use_rslora` and `alpha_pattern`, which is not what they ask for.
const REFUSED: [&str; 20] = [
    "use_dora",
    "use_rslora",
    "alpha_pattern",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "lora_ga_config",
    "loftq_config",
];

/// The fields in PEFT's order (sorted), without ids and times. `kept` says which triplets are left, by module.
pub fn write(
    spec: &AdaLoraSpec,
    base: &BaseInfo,
    budget: &Budget,
    kept: Option<Vec<(&Module, &[bool])>>,
) -> BTreeMap<&'static str, Value> {
    let pattern = |kept: Vec<(&Module, &[bool])>| -> BTreeMap<String, Value> {
        kept.into_iter().map(|(module, kept)| (module.key(), json!(kept))).collect()
    };
    BTreeMap::from([
        ("alpha_pattern", json!({})),
        ("base_model_name_or_path", json!(base.id)),
        ("beta1", json!(spec.beta1)),
        ("beta2", json!(spec.beta2)),
        ("bias", json!("none")),
        ("deltaT", json!(budget.delta_t)),
        ("exclude_modules", spec.exclude_modules.as_ref().map_or(Value::Null, modules)),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(true)),
        ("init_r", json!(spec.init_r)),
        ("layers_pattern", Value::Null),
        ("layers_to_transform", json!(spec.layers_to_transform)),
        ("lora_alpha", number(spec.lora_alpha)),
        ("lora_dropout", json!(spec.lora_dropout)),
        ("modules_to_save", Value::Null),
        ("orth_reg_weight", json!(spec.orth_reg_weight)),
        ("peft_type", json!("ADALORA")),
        ("rank_pattern", json!(kept.map(pattern))),
        ("revision", Value::Null),
        ("target_modules", modules(&spec.target_modules)),
        ("target_r", json!(spec.target_r)),
        ("task_type", json!("CAUSAL_LM")),
        ("tfinal", json!(budget.tfinal)),
        ("tinit", json!(budget.tinit)),
        ("total_step", json!(budget.total_steps)),
        ("use_dora", json!(false)),
        ("use_rslora", json!(false)),
    ])
}

/// The spec that the config stands for.
pub fn read(config: &Map<String, Value>) -> Result<AdaLoraSpec, MethodError> {
    refuse(config, &REFUSED)?;
    only(config, "bias", "none")?;
    only(config, "task_type", "CAUSAL_LM")?;
    layers_pattern(config)?;
    let default = AdaLoraSpec::default();
    // PEFT's own defaults, where the file leaves a key out.
    Ok(AdaLoraSpec {
        init_r: field(config, "init_r")?.unwrap_or(default.init_r),
        target_r: field(config, "target_r")?.unwrap_or(default.target_r),
        tinit: Some(field(config, "tinit")?.unwrap_or(0)),
        tfinal: Some(field(config, "tfinal")?.unwrap_or(0)),
        delta_t: field(config, "deltaT")?.unwrap_or(default.delta_t),
        beta1: field(config, "beta1")?.unwrap_or(default.beta1),
        beta2: field(config, "beta2")?.unwrap_or(default.beta2),
        orth_reg_weight: field(config, "orth_reg_weight")?.unwrap_or(default.orth_reg_weight),
        lora_alpha: field(config, "lora_alpha")?.unwrap_or(8.0),
        lora_dropout: field(config, "lora_dropout")?.unwrap_or(0.0),
        target_modules: field(config, "target_modules")?
            .unwrap_or_else(|| Targets::Names(vec!["q_proj".into(), "v_proj".into()])),
        exclude_modules: field(config, "exclude_modules")?,
        layers_to_transform: layers(config)?,
    })
}

/// The run that a file comes from, as it says.
pub fn budget(config: &Map<String, Value>, spec: &AdaLoraSpec) -> Result<Budget, MethodError> {
    let (tinit, tfinal) = (spec.tinit.unwrap_or(0), spec.tfinal.unwrap_or(0));
    let total_steps = field(config, "total_step")?.unwrap_or(tinit + tfinal + 1);
    Ok(Budget { tinit, tfinal, delta_t: spec.delta_t, total_steps })
}

/// Which triplets of each module the file holds; none when nothing is pruned.
pub fn kept(
    config: &Map<String, Value>,
    spec: &AdaLoraSpec,
    modules: &[Module],
) -> Result<Option<Vec<Vec<bool>>>, MethodError> {
    let mismatch = |text: String| MethodError::Mismatch(format!("adapter_config.json: rank_pattern: {text}"));
    let Some(mut pattern) = field::<BTreeMap<String, Vec<bool>>>(config, "rank_pattern")? else { return Ok(None) };
    if pattern.is_empty() {
        return Ok(None);
    }
    let kept = modules.iter().map(|module| pattern.remove(&module.key()).unwrap_or_else(|| vec![true; spec.init_r]));
    let kept: Vec<Vec<bool>> = kept.collect();
    if let Some((key, _)) = pattern.first_key_value() {
        return Err(mismatch(format!("{key} is no target")));
    }
    match modules.iter().zip(&kept).find(|(_, kept)| kept.len() != spec.init_r) {
        Some((module, kept)) => {
            Err(mismatch(format!("{} lists {} triplets, not init_r, {}", module.key(), kept.len(), spec.init_r)))
        }
        None => Ok(Some(kept)),
    }
}
