//! Conversations as prompts.

use serde_json::{Value, json};

use super::{Problem, catalogue::Model};
use crate::text::TextError;

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

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
    let role = match fields.get("role").and_then(Value::as_str) {
        Some(role) if ROLES.contains(&role) => role,
        _ => return Err(invalid(format!("{path}.role"), format!("{path}.role is not one of {}", ROLES.join(", ")))),
    };
    let own: &[&str] = match role {
        "assistant" => &["tool_calls"],
        "tool" => &["tool_call_id"],
        _ => &[],
    };
    let known = |name: &str| ["role", "content"].contains(&name) || own.contains(&name);
    if let Some((name, _)) = fields.iter().find(|(name, value)| !known(name) && !value.is_null()) {
        let param = format!("{path}.{name}");
        let message = format!("{param} is not supported by this server");
        return Err(Problem::invalid(param, "unsupported_parameter", message));
    }
    let calls = fields.get("tool_calls").filter(|calls| !calls.is_null());
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => text_of(path, parts)?,
        None | Some(Value::Null) if calls.is_some() => String::new(),
        _ => return Err(invalid(format!("{path}.content"), format!("{path}.content is not a text"))),
    };
    // Templates know the older name.
    let shown = if role == "developer" { "system" } else { role };
    let mut shown = json!({"role": shown, "content": content});
    if let Some(calls) = calls {
        check_calls(&format!("{path}.tool_calls"), calls)?;
        shown["tool_calls"] = calls.clone();
    }
    if role == "tool" {
        let Some(id) = fields.get("tool_call_id").and_then(Value::as_str) else {
            return Err(invalid(format!("{path}.tool_call_id"), format!("{path}.tool_call_id is not a text")));
        };
        shown["tool_call_id"] = json!(id);
    }
    Ok(shown)
}

/// Calls that an assistant made before: functions, their arguments in JSON.
fn check_calls(path: &str, calls: &Value) -> Result<(), Problem> {
    let invalid =
        |param: String, why: &str| Err(Problem::invalid(param.clone(), "invalid_message", format!("{param} {why}")));
    let Some(calls) = calls.as_array().filter(|calls| !calls.is_empty()) else {
        return invalid(path.to_owned(), "is not a list of calls");
    };
    for (i, call) in calls.iter().enumerate() {
        let path = format!("{path}.{i}");
        if call["type"] != "function" || !call["function"]["name"].is_string() || !call["id"].is_string() {
            return invalid(path, "needs an id, the type function and the function's name");
        }
        let arguments = call["function"]["arguments"].as_str().map(serde_json::from_str::<Value>);
        if !matches!(arguments, Some(Ok(Value::Object(_)))) {
            return invalid(format!("{path}.function.arguments"), "is not a JSON object as text");
        }
    }
    Ok(())
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
pub fn prompt(model: &Model, messages: &[Value], tools: Option<&[Value]>) -> Result<Vec<u32>, Problem> {
    let text = &model.resident.text;
    let template = text.template.as_ref().ok_or_else(|| TextError::NoTemplate(model.resident.base.info.id.clone()))?;
    let of_tools = |message: &Value| message["role"] == "tool" || message.get("tool_calls").is_some();
    if let Some(i) = messages.iter().position(of_tools).filter(|_| !template.shows_calls()) {
        let base = &model.resident.base.info.id;
        let message = format!("messages.{i}: the chat template of {base} has no place for calls of tools");
        return Err(Problem::invalid(format!("messages.{i}"), "tools_unsupported", message));
    }
    let rendered = template.render(messages, tools, true)?;
    Ok(text.tokenizer.encode(&rendered, true)?)
}
