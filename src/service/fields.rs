//! Request bodies, read so that every fault names its field.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::Problem;

/// A field that the wire documents and that we do not serve: fine as long as it says nothing.
pub struct Unsupported {
    pub name: &'static str,
    /// Values that ask for what happens anyway.
    pub neutral: fn(&Value) -> bool,
}

impl Unsupported {
    /// Nothing but null is neutral.
    pub const fn always(name: &'static str) -> Self {
        Self { name, neutral: |_| false }
    }
}

/// Removes unsupported fields that are null or neutral; any other is an error by name.
pub fn refuse_unsupported(body: &mut Map<String, Value>, list: &[Unsupported]) -> Result<(), Problem> {
    for field in list {
        match body.shift_remove(field.name) {
            None | Some(Value::Null) => {}
            Some(value) if (field.neutral)(&value) => {}
            Some(_) => {
                let message = format!("{} is not supported by this server", field.name);
                return Err(Problem::invalid(field.name, "unsupported_parameter", message));
            }
        }
    }
    Ok(())
}

/// Reads a typed body; the type denies unknown fields. Nulls are absent fields.
pub fn read<T: DeserializeOwned>(mut body: Map<String, Value>) -> Result<T, Problem> {
    body.retain(|_, value| !value.is_null());
    serde_path_to_error::deserialize(Value::Object(body)).map_err(|error| {
        let path = error.path().to_string();
        let message = error.inner().to_string();
        match between_ticks(&message, "unknown field ") {
            Some(name) => {
                let param = if path == "." { name.to_owned() } else { format!("{path}.{name}") };
                // serde_path_to_error's path includes the field itself.
                let param = if path.rsplit('.').next() == Some(name) { path } else { param };
                Problem::invalid(param.clone(), "unknown_parameter", format!("unknown field {param}"))
            }
            None => match between_ticks(&message, "missing field ") {
                Some(name) => Problem::invalid(name, "missing_required_parameter", format!("missing field {name}")),
                None => Problem::invalid(path.clone(), "invalid_type", format!("{path}: {message}")),
            },
        }
    })
}

fn between_ticks<'a>(message: &'a str, before: &str) -> Option<&'a str> {
    message.strip_prefix(before)?.strip_prefix('`')?.split('`').next()
}

/// A number inside its range.
pub fn in_range<T: PartialOrd + std::fmt::Display>(param: &str, value: T, least: T, most: T) -> Result<T, Problem> {
    if value >= least && value <= most {
        return Ok(value);
    }
    let message = format!("{param} is {value}, outside {least} to {most}");
    Err(Problem::invalid(param, "out_of_range", message))
}

/// At most 16 pairs of strings, keys to 64 and values to 512 characters.
pub fn check_metadata(metadata: &Value) -> Result<(), Problem> {
    let wrong = |why: &str| Err(Problem::invalid("metadata", "invalid_metadata", format!("metadata: {why}")));
    let Some(pairs) = metadata.as_object() else { return wrong("not an object") };
    if pairs.len() > 16 {
        return wrong("more than 16 pairs");
    }
    for (key, value) in pairs {
        match value.as_str() {
            _ if key.chars().count() > 64 => return wrong("a key of more than 64 characters"),
            None => return wrong("a value that is not a string"),
            Some(value) if value.chars().count() > 512 => return wrong("a value of more than 512 characters"),
            Some(_) => {}
        }
    }
    Ok(())
}
