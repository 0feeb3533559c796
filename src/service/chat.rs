//! Conversations as prompts.

use serde_json::{Value, json};

use super::{Problem, catalogue::Model};
use crate::text::TextError;

const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// Checks messages in OpenAI's shape and brings them into the one that templates take.
pub fn messages(messages: &[Value]) -> Result<Vec<Value>, Problem> {
    if messages.is_empty() {
        return Err(Problem::invalid("messages", "empty_messages", "messages is empty"));
    }
    messages.iter().enumerate().map(|(i, message)| one(&format!("messages.{i}"), message)).collect()
}

fn one(path: &str, message: &Value) -> Result<Value, Problem> {
    let invalid = |param: String, why: String| Problem::invalid(param, "invalid_message", why);
    let Some(fields) = message.as_object() else {
        return Err(invalid(path.to_owned(), format!("{path} is not an object")));
    };
    if let Some((name, _)) = fields.iter().find(|(k, v)| !["role", "content"].contains(&k.as_str()) && !v.is_null()) {
        let param = format!("{path}.{name}");
        let message = format!("{param} is not supported by this server");
        return Err(Problem::invalid(param, "unsupported_parameter", message));
    }
    let role = match fields.get("role").and_then(Value::as_str) {
        Some(role) if ROLES.contains(&role) => role,
        _ => return Err(invalid(format!("{path}.role"), format!("{path}.role is not one of {}", ROLES.join(", ")))),
    };
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => text_of(path, parts)?,
        _ => return Err(invalid(format!("{path}.content"), format!("{path}.content is not a text"))),
    };
    // Templates know the older name.
    let role = if role == "developer" { "system" } else { role };
    Ok(json!({"role": role, "content": content}))
}

fn text_of(path: &str, parts: &[Value]) -> Result<String, Problem> {
    let mut text = String::new();
    for (i, part) in parts.iter().enumerate() {
        let param = format!("{path}.content.{i}");
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(part)) => text.push_str(part),
            _ => {
                let message = format!("{param}: only parts of type text are supported");
                return Err(Problem::invalid(param, "unsupported_parameter", message));
            }
        }
    }
    Ok(text)
}

/// The prompt's ids, as the base's template writes the conversation.
pub fn prompt(model: &Model, messages: &[Value]) -> Result<Vec<u32>, Problem> {
    let text = &model.resident.text;
    let template = text.template.as_ref().ok_or_else(|| TextError::NoTemplate(model.resident.base.info.id.clone()))?;
    let rendered = template.render(messages, None, true)?;
    Ok(text.tokenizer.encode(&rendered, true)?)
}
