//! Reads one object of a request: unknown fields, fields given twice and wrong types are errors by name.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::SpecError;

/// Other spellings of a field: `(spelling, field)`.
pub type Aliases = &'static [(&'static str, &'static str)];

/// `value` as `T`, whose fields all have defaults; a null is the default. `path` is where the object stands in the
/// request (`adapter`), and `skip` names a field that someone else has read (`type`).
pub fn object<T>(value: &Value, path: &str, aliases: Aliases, skip: &str) -> Result<T, SpecError>
where
    T: Default + Serialize + DeserializeOwned,
{
    typed(named::<T>(value, path, aliases, skip)?, path)
}

/// The fields of `T` by their own names, as given or by default.
pub fn named<T>(value: &Value, path: &str, aliases: Aliases, skip: &str) -> Result<Map<String, Value>, SpecError>
where
    T: Default + Serialize,
{
    let fields = fields(value, path)?;
    let defaults = match serde_json::to_value(T::default()) {
        Ok(Value::Object(defaults)) => defaults,
        _ => Map::new(),
    };
    let mut known: Vec<String> = defaults.keys().cloned().collect();
    let mut named = Map::new();
    for (key, value) in fields.iter().filter(|(key, _)| *key != skip) {
        let name = aliases.iter().find(|(spelling, _)| spelling == key).map_or(key.as_str(), |(_, name)| *name);
        let param = join(path, key);
        if !known.iter().any(|field| field == name) {
            known.extend(aliases.iter().map(|(spelling, _)| (*spelling).to_owned()));
            known.sort();
            let message = format!("unknown field {param}; known are {}", known.join(", "));
            return Err(SpecError::new(param, "spec_unknown_field", message));
        }
        if named.insert(name.to_owned(), value.clone()).is_some() {
            let message = format!("{} is given twice, under two names", join(path, name));
            return Err(SpecError::new(join(path, name), "spec_given_twice", message));
        }
    }
    named.retain(|_, value| !value.is_null());
    // Presets of one struct differ in their defaults.
    defaults.into_iter().for_each(|(name, value)| _ = named.entry(name).or_insert(value));
    Ok(named)
}

pub fn typed<T: DeserializeOwned>(named: Map<String, Value>, path: &str) -> Result<T, SpecError> {
    serde_path_to_error::deserialize(Value::Object(named)).map_err(|error| {
        let inner = error.path().to_string();
        let param = if inner == "." { path.to_owned() } else { join(path, &inner) };
        let message = format!("{param}: {}", error.into_inner());
        SpecError::new(param, "spec_invalid_type", message)
    })
}

/// The object's fields, or an error that names it.
pub fn fields<'a>(value: &'a Value, path: &str) -> Result<&'a Map<String, Value>, SpecError> {
    value.as_object().ok_or_else(|| SpecError::new(path, "spec_invalid_type", format!("{path} is not a JSON object")))
}

pub fn join(path: &str, field: &str) -> String {
    format!("{path}.{field}")
}

/// A number outside its range, with the limits in words.
pub fn out_of_range(param: &str, value: impl std::fmt::Display, limits: &str) -> SpecError {
    SpecError::new(param, "spec_out_of_range", format!("{param} is {value}; it must be {limits}"))
}

pub fn positive(param: &str, value: f64) -> Result<(), SpecError> {
    if value.is_finite() && value > 0.0 { Ok(()) } else { Err(out_of_range(param, value, "above 0")) }
}
