//! `response_format`: what an answer must be.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Problem, catalogue::Model};
use crate::text::Grammar;

/// OpenAI's `response_format`.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResponseFormat {
    Text {},
    JsonObject {},
    JsonSchema { json_schema: NamedSchema },
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedSchema {
    name: String,
    /// For people; it changes nothing.
    #[serde(rename = "description")]
    _description: Option<String>,
    schema: Option<Value>,
    strict: Option<bool>,
}

/// What the answer is held to; none for any text.
pub async fn grammar(model: &Model, format: Option<&ResponseFormat>) -> Result<Option<Grammar>, Problem> {
    let (schema, param) = match format {
        None | Some(ResponseFormat::Text {}) => return Ok(None),
        Some(ResponseFormat::JsonObject {}) => (json!({"type": "object"}), "response_format"),
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            (checked(json_schema)?, "response_format.json_schema.schema")
        }
    };
    let text = model.resident.text.clone();
    let compile = move || text.grammars()?.json(&schema);
    let compiled = tokio::task::spawn_blocking(compile).await.map_err(Problem::internal)?;
    compiled.map(Some).map_err(|error| Problem::invalid(param, "invalid_json_schema", format!("{param}: {error}")))
}

fn checked(named: &NamedSchema) -> Result<Value, Problem> {
    let param = "response_format.json_schema";
    if !is_name(&named.name) {
        let message = format!("{param}.name takes 1 to 64 letters, digits, underscores and dashes");
        return Err(Problem::invalid(format!("{param}.name"), "invalid_name", message));
    }
    let schema = named.schema.clone().unwrap_or_else(|| json!({"type": "object"}));
    if named.strict == Some(true) {
        strict(&schema, &format!("{param}.schema"))?;
    }
    Ok(schema)
}

/// 1 to 64 letters, digits, underscores and dashes: names of schemas and functions.
pub fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

/// What OpenAI asks of strict schemas: every object names all of its properties as required, and allows no other.
pub fn strict(schema: &Value, path: &str) -> Result<(), Problem> {
    let wrong = |why: &str| Err(Problem::invalid(path, "invalid_json_schema", format!("{path}: strict schemas {why}")));
    match schema {
        Value::Object(fields) => {
            let names = fields.get("properties").and_then(Value::as_object);
            if names.is_some() || fields.get("type").is_some_and(|kind| kind == "object") {
                if fields.get("additionalProperties") != Some(&Value::Bool(false)) {
                    return wrong("have additionalProperties false in every object");
                }
                if let Some(name) = names.and_then(|names| first_optional(names, fields)) {
                    return wrong(&format!("require every property, and {name} is not in required"));
                }
            }
            fields.iter().try_for_each(|(key, value)| match key.as_str() {
                // Data, not schemas.
                "enum" | "const" | "default" | "examples" => Ok(()),
                key => strict(value, &format!("{path}.{key}")),
            })
        }
        Value::Array(items) => items.iter().enumerate().try_for_each(|(i, item)| strict(item, &format!("{path}.{i}"))),
        _ => Ok(()),
    }
}

fn first_optional<'a>(names: &'a Map<String, Value>, fields: &Map<String, Value>) -> Option<&'a String> {
    let required = fields.get("required").and_then(Value::as_array);
    names.keys().find(|name| !required.is_some_and(|all| all.iter().any(|other| other == *name)))
}
