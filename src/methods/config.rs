//! Keys that the `adapter_config.json` files of several methods have.

use serde_json::{Map, Value, json};

use super::{
    MethodError,
    file::{field, says_something},
};
use crate::domain::{
    Site,
    spec::{ALL_LINEAR, Targets},
};

/// Keys that change the arithmetic or the base when they say anything: refused by name.
pub fn refuse(config: &Map<String, Value>, keys: &[&str]) -> Result<(), MethodError> {
    match keys.iter().find(|key| config.get(**key).is_some_and(says_something)) {
        Some(key) => Err(MethodError::Unsupported(format!("adapter_config.json: {key} is not supported"))),
        None => Ok(()),
    }
}

/// A key of which we have one value only.
pub fn only(config: &Map<String, Value>, key: &str, value: &str) -> Result<(), MethodError> {
    match field::<String>(config, key)?.filter(|found| found != value) {
        Some(found) => Err(MethodError::Unsupported(format!("adapter_config.json: {key} {found:?} is not supported"))),
        None => Ok(()),
    }
}

/// `layers_pattern` names the list that `layers_to_transform` counts in; there is one.
pub fn layers_pattern(config: &Map<String, Value>) -> Result<(), MethodError> {
    let is_ours = match config.get("layers_pattern") {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text == "layers",
        Some(Value::Array(items)) => items.iter().all(|item| item == "layers"),
        _ => false,
    };
    let refusal = || MethodError::Unsupported("adapter_config.json: layers_pattern is not supported".into());
    if is_ours { Ok(()) } else { Err(refusal()) }
}

/// `layers_to_transform`
pub fn layers(config: &Map<String, Value>) -> Result<Option<Vec<usize>>, MethodError> {
    match config.get("layers_to_transform") {
        Some(Value::Number(_)) => Ok(field(config, "layers_to_transform")?.map(|layer| vec![layer])),
        _ => field(config, "layers_to_transform"),
    }
}

/// PEFT resolves `all-linear` before it saves; lists are sorted, because PEFT's order is that of a set.
pub fn modules(targets: &Targets) -> Value {
    let mut names: Vec<String> = match targets {
        Targets::Pattern(text) if text != ALL_LINEAR => return json!(text),
        Targets::Pattern(_) => Site::LAYER.iter().map(|site| short(site.module())).collect(),
        Targets::Names(names) => names.clone(),
    };
    names.sort();
    names.dedup();
    json!(names)
}

fn short(module: &str) -> String {
    module.rsplit('.').next().unwrap_or(module).to_owned()
}
