//! X-LoRA as PEFT's directory: the classifier at its top, each expert in a directory called by its place.
//!
//! PEFT 0.21.2 itself writes incomplete directories: of the classifier it keeps only layers whose names hold none of its
//! experts' (`.0.`, `.1.`). Those are refused as they are read, by the tensor that is missing.

use serde_json::{Map, Value};

use crate::methods::{
    AdapterFiles, MethodError, Named,
    file::{self, CONFIG, WEIGHTS},
};

/// Path and bytes of each file.
type Entries = Vec<(String, Vec<u8>)>;

pub fn is_xlora(config: &Map<String, Value>) -> bool {
    config.get("peft_type").is_some_and(|found| found == "XLORA")
}

/// The directory of an adapter's files.
pub fn write(files: &AdapterFiles) -> Result<Entries, MethodError> {
    let mut config = file::config(files)?;
    let experts: Vec<Map<String, Value>> = file::field(&config, "experts")?.unwrap_or_default();
    config.shift_remove("experts");
    let (mut own, mut inner) = (Vec::new(), vec![Vec::new(); experts.len()]);
    for (name, shape, values) in named(&files.weights)? {
        let folder = name.split_once('/').and_then(|(folder, rest)| Some((folder.parse::<usize>().ok()?, rest)));
        match folder.and_then(|(folder, rest)| Some((inner.get_mut(folder)?, rest))) {
            Some((inner, rest)) => inner.push((rest.to_owned(), shape, values)),
            None => own.push((name, shape, values)),
        }
    }
    let mut entries = vec![(CONFIG.to_owned(), bytes(&config)), (WEIGHTS.to_owned(), file::tensor_bytes(&own))];
    for (i, (config, tensors)) in experts.iter().zip(inner).enumerate() {
        entries.push((format!("{i}/{CONFIG}"), bytes(config)));
        entries.push((format!("{i}/{WEIGHTS}"), file::tensor_bytes(&tensors)));
    }
    Ok(entries)
}

/// An adapter's files of what lies at the top of a directory and of its experts, by directory.
pub fn read(top: AdapterFiles, inner: Vec<(String, AdapterFiles)>) -> Result<AdapterFiles, MethodError> {
    let (mut config, mut tensors) = (file::config(&top)?, named(&top.weights)?);
    let wanted: Map<String, Value> = file::field(&config, "adapters")?.unwrap_or_default();
    let mut configs = Vec::new();
    for i in 0..wanted.len().max(inner.len()) {
        let Some((_, expert)) = inner.iter().find(|(folder, _)| *folder == i.to_string()) else {
            let message = format!("the archive has no expert {i}: experts lie in directories called 0, 1, …");
            return Err(MethodError::Mismatch(message));
        };
        configs.push(Value::Object(file::config(expert)?));
        let own = named(&expert.weights)?.into_iter();
        tensors.extend(own.map(|(name, shape, values)| (format!("{i}/{}", plain(&name)), shape, values)));
    }
    tensors.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    config.insert("experts".to_owned(), Value::Array(configs));
    Ok(AdapterFiles { config: bytes(&config), weights: file::tensor_bytes(&tensors) })
}

/// A name as LoRA's files have it, whatever model it was saved from.
fn plain(name: &str) -> String {
    match name.find("model.layers.") {
        Some(at) => format!("base_model.model.{}", &name[at..]),
        None => name.to_owned(),
    }
}

fn named(weights: &[u8]) -> Result<Vec<Named>, MethodError> {
    let shapes = file::shapes(weights)?;
    let values = file::tensors(weights, &shapes)?;
    Ok(shapes.into_iter().zip(values).map(|((name, shape), values)| (name, shape, values)).collect())
}

/// Sorted, as all our configs are.
fn bytes(config: &Map<String, Value>) -> Vec<u8> {
    file::config_bytes(&config.iter().map(|(key, value)| (key.as_str(), value.clone())).collect())
}
