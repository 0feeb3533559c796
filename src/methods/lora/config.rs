//! LoRA's `adapter_config.json`, in PEFT's words.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{
    domain::{
        BaseInfo, LoraSpec,
        spec::{LoraInit, LoraInitName, Targets},
    },
    methods::{
        MethodError,
        config::{layers, layers_pattern, modules, only, refuse},
        file::{field, number},
    },
};

/// Keys that change the arithmetic or the base when they say anything: refused by name.
const REFUSED: [&str; 15] = [
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "fan_in_fan_out",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "lora_ga_config",
    "loftq_config",
    "megatron_config",
];

/// Starting points that leave the base as it is, so that A and B are all there is.
const NEUTRAL_INITS: [&str; 2] = ["eva", "orthogonal"];

/// The fields in PEFT's order (sorted), without ids and times.
pub fn write(spec: &LoraSpec, base: &BaseInfo) -> BTreeMap<&'static str, Value> {
    BTreeMap::from([
        ("alpha_pattern", spec.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), number(*alpha))).collect()),
        ("base_model_name_or_path", json!(base.id)),
        ("bias", json!("none")),
        ("ensure_weight_tying", json!(false)),
        ("exclude_modules", spec.exclude_modules.as_ref().map_or(Value::Null, modules)),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(spec.init_lora_weights)),
        ("layer_replication", Value::Null),
        ("layers_pattern", Value::Null),
        ("layers_to_transform", json!(spec.layers_to_transform)),
        ("loftq_config", json!({})),
        ("lora_alpha", number(spec.lora_alpha)),
        ("lora_bias", json!(false)),
        ("lora_dropout", json!(spec.lora_dropout)),
        ("modules_to_save", json!(spec.modules_to_save)),
        ("peft_type", json!("LORA")),
        ("r", json!(spec.r)),
        ("rank_pattern", json!(spec.rank_pattern)),
        ("revision", Value::Null),
        ("target_modules", modules(&spec.target_modules)),
        ("task_type", json!("CAUSAL_LM")),
        ("trainable_token_indices", json!(spec.trainable_token_indices)),
        ("use_dora", json!(false)),
        ("use_rslora", json!(spec.use_rslora)),
    ])
}

/// The spec that the config stands for.
pub fn read(config: &Map<String, Value>) -> Result<LoraSpec, MethodError> {
    refuse(config, &REFUSED)?;
    only(config, "bias", "none")?;
    only(config, "task_type", "CAUSAL_LM")?;
    layers_pattern(config)?;
    // PEFT's own defaults, where the file leaves a key out.
    Ok(LoraSpec {
        r: field(config, "r")?.unwrap_or(8),
        lora_alpha: field(config, "lora_alpha")?.unwrap_or(8.0),
        lora_dropout: field(config, "lora_dropout")?.unwrap_or(0.0),
        target_modules: field(config, "target_modules")?
            .unwrap_or_else(|| Targets::Names(vec!["q_proj".into(), "v_proj".into()])),
        exclude_modules: field(config, "exclude_modules")?,
        use_rslora: field(config, "use_rslora")?.unwrap_or(false),
        init_lora_weights: init(config)?,
        rank_pattern: field(config, "rank_pattern")?.unwrap_or_default(),
        alpha_pattern: field(config, "alpha_pattern")?.unwrap_or_default(),
        layers_to_transform: layers(config)?,
        modules_to_save: field::<Vec<String>>(config, "modules_to_save")?.filter(|names| !names.is_empty()),
        trainable_token_indices: tokens(config)?,
        loraplus_lr_ratio: None,
        ..LoraSpec::default()
    })
}

/// A list of tokens, or `{"embed_tokens": [..]}`.
fn tokens(config: &Map<String, Value>) -> Result<Option<Vec<u32>>, MethodError> {
    let key = "trainable_token_indices";
    let Some(Value::Object(modules)) = config.get(key) else { return field(config, key) };
    match modules.iter().next() {
        None => Ok(None),
        Some((name, _)) if modules.len() == 1 && name.ends_with("embed_tokens") => field(modules, name),
        Some((name, _)) => {
            Err(MethodError::Unsupported(format!("adapter_config.json: {key} of {name} is not supported")))
        }
    }
}

fn init(config: &Map<String, Value>) -> Result<LoraInit, MethodError> {
    match config.get("init_lora_weights") {
        None | Some(Value::Null) => Ok(LoraInit::Flag(true)),
        Some(Value::Bool(flag)) => Ok(LoraInit::Flag(*flag)),
        Some(Value::String(name)) if name == "gaussian" => Ok(LoraInit::Named(LoraInitName::Gaussian)),
        Some(Value::String(name)) if NEUTRAL_INITS.contains(&name.as_str()) => Ok(LoraInit::Flag(true)),
        Some(other) => Err(MethodError::Unsupported(format!(
            "adapter_config.json: init_lora_weights {other} changes the base; convert the adapter to plain LoRA first"
        ))),
    }
}
