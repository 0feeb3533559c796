//! (IA)³'s `adapter_config.json`, in PEFT's words.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{
    domain::{BaseInfo, Ia3Spec, spec::Targets},
    methods::{
        MethodError,
        config::{modules, only, refuse},
        file::field,
    },
};

const REFUSED: [&str; 2] = ["fan_in_fan_out", "modules_to_save"];

/// The fields in PEFT's order (sorted), without ids and times. `spec` has every module named.
pub fn write(spec: &Ia3Spec, base: &BaseInfo) -> BTreeMap<&'static str, Value> {
    let names = |targets: &Option<Targets>| targets.as_ref().map_or(Value::Null, modules);
    BTreeMap::from([
        ("base_model_name_or_path", json!(base.id)),
        ("exclude_modules", names(&spec.exclude_modules)),
        ("fan_in_fan_out", json!(false)),
        ("feedforward_modules", names(&spec.feedforward_modules)),
        ("inference_mode", json!(true)),
        ("init_ia3_weights", json!(true)),
        ("modules_to_save", Value::Null),
        ("peft_type", json!("IA3")),
        ("revision", Value::Null),
        ("target_modules", names(&spec.target_modules)),
        ("task_type", json!("CAUSAL_LM")),
    ])
}

/// The spec that the config stands for.
pub fn read(config: &Map<String, Value>) -> Result<Ia3Spec, MethodError> {
    refuse(config, &REFUSED)?;
    only(config, "task_type", "CAUSAL_LM")?;
    Ok(Ia3Spec {
        target_modules: field(config, "target_modules")?,
        exclude_modules: field(config, "exclude_modules")?,
        feedforward_modules: field(config, "feedforward_modules")?,
    })
}
