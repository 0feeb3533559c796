//! PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

pub use crate::formats::safetensors::write as tensor_bytes;
use crate::{
    formats::{Storage, TensorView, safetensors::Safetensors},
    model::kernels::elementwise::are_finite,
};

/// The names of an adapter's files in PEFT's directory and in the store.
pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// The two files' bytes. Their order and content are the adapter's identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterFiles {
    /// `adapter_config.json`
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`
    pub weights: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum MethodError {
    /// The files do not fit the base or each other; names the key, tensor or shape.
    #[error("{0}")]
    Mismatch(String),
    /// PEFT has this, we do not: names the config's key.
    #[error("{0}")]
    Unsupported(String),
    #[error(transparent)]
    Format(#[from] crate::formats::FormatError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
}

/// A config as PEFT writes it: keys sorted, indent 2.
pub fn config_bytes(fields: &BTreeMap<&str, Value>) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(fields).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Reads `adapter_config.json` as an object.
pub fn config(files: &AdapterFiles) -> Result<Map<String, Value>, MethodError> {
    match serde_json::from_slice(&files.config) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(MethodError::Mismatch("adapter_config.json is not a JSON object".into())),
        Err(error) => Err(MethodError::Mismatch(format!("adapter_config.json: {error}"))),
    }
}

/// A config's value, none where it is left out or null.
pub fn field<T: DeserializeOwned>(config: &Map<String, Value>, key: &str) -> Result<Option<T>, MethodError> {
    let Some(value) = config.get(key) else { return Ok(None) };
    Option::<T>::deserialize(value)
        .map_err(|error| MethodError::Mismatch(format!("adapter_config.json: {key}: {error}")))
}

/// Whether a config's value is more than null, false or empty.
pub fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => true,
    }
}

/// Whole numbers without a fraction, as PEFT writes them.
pub fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

/// Reads exactly the tensors that `expected` lists, as F32, in its order. A missing or unexpected tensor, another
/// shape and a value that is not finite are errors that name the tensor.
pub fn tensors(weights: &[u8], expected: &[(String, Vec<usize>)]) -> Result<Vec<Vec<f32>>, MethodError> {
    let file = Safetensors::of(weights)?;
    let names: std::collections::BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let mut unexpected: Vec<&str> = file.names().filter(|name| !names.contains(name)).collect();
    unexpected.sort_unstable();
    if let Some(name) = unexpected.first() {
        let count = unexpected.len();
        return Err(MethodError::Mismatch(format!("{count} tensors match no module of the base: {name} …")));
    }
    expected.par_iter().map(|(name, shape)| checked(&file, name, shape)).collect()
}

/// Trained tensors with these first values, in order.
pub fn variables(names: Vec<(String, Vec<usize>)>, values: Vec<Vec<f32>>) -> Result<Vec<(String, Var)>, MethodError> {
    let variable =
        |((name, shape), values)| Ok((name, Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)?));
    names.into_iter().zip(values).map(variable).collect()
}

/// `adapter_model.safetensors` of variables under their own names.
pub fn variable_bytes(variables: &[(String, Var)]) -> Result<Vec<u8>, MethodError> {
    let named = variables
        .iter()
        .map(|(name, variable)| Ok((name.clone(), variable.dims().to_vec(), variable.flatten_all()?.to_vec1::<f32>()?)))
        .collect::<Result<Vec<_>, MethodError>>()?;
    Ok(tensor_bytes(&named))
}

/// Every tensor's name and shape, by name.
pub fn shapes(weights: &[u8]) -> Result<Vec<(String, Vec<usize>)>, MethodError> {
    let file = Safetensors::of(weights)?;
    let mut shapes: Vec<(String, Vec<usize>)> =
        file.names().filter_map(|name| Some((name.to_owned(), file.tensor(name)?.shape.to_vec()))).collect();
    shapes.sort_unstable();
    Ok(shapes)
}

fn checked(file: &Safetensors<&[u8]>, name: &str, shape: &[usize]) -> Result<Vec<f32>, MethodError> {
    let Some(view) = file.tensor(name) else {
        return Err(MethodError::Mismatch(format!("tensor {name} is missing")));
    };
    if view.shape != shape {
        return Err(MethodError::Mismatch(format!("tensor {name} has shape {:?}, not {shape:?}", view.shape)));
    }
    let values = floats(name, &view)?;
    if are_finite(&values) {
        return Ok(values);
    }
    let (at, value) = values.iter().enumerate().find(|(_, value)| !value.is_finite()).unwrap_or((0, &f32::NAN));
    Err(MethodError::Mismatch(format!("tensor {name} has {value} at place {at}")))
}

/// A view's numbers as F32.
pub fn floats(name: &str, view: &TensorView) -> Result<Vec<f32>, MethodError> {
    let halves = || view.data.as_chunks::<2>().0.iter();
    match view.storage {
        Storage::F32 => Ok(view.data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
        Storage::F16 => Ok(halves().map(|bytes| half::f16::from_le_bytes(*bytes).to_f32()).collect()),
        Storage::BF16 => Ok(halves().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect()),
        other => Err(MethodError::Mismatch(format!("tensor {name} is stored as {}", other.name()))),
    }
}
