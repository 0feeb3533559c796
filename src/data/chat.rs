//! Conversations: OpenAI's chat rows, and the two older formats that are converted to them.

use serde_json::{Map, Value, json};

use super::{Chat, Fault, MAX_MESSAGES, Question, record, shown};

pub const ROW_FIELDS: &[&str] = &["messages", "tools", "parallel_tool_calls"];
const SHARED_FIELDS: &[&str] = &["role", "content", "name"];
const ASSISTANT_FIELDS: &[&str] = &["role", "content", "name", "weight", "tool_calls", "refusal"];
const TOOL_FIELDS: &[&str] = &["role", "content", "name", "tool_call_id"];

pub fn parse(row: Map<String, Value>) -> Result<Chat, Fault> {
    record::only(&row, ROW_FIELDS, "the row")?;
    let (messages, tools) = fields(row)?;
    conversation(messages, tools)
}

/// The messages and tools of an object in OpenAI's shape.
pub fn fields(mut row: Map<String, Value>) -> Result<(Vec<Value>, Option<Vec<Value>>), Fault> {
    let tools = tools(row.remove("tools"))?;
    if row.get("parallel_tool_calls").is_some_and(|v| !v.is_boolean()) {
        return Err(Fault::new("invalid_type", "`parallel_tool_calls` must be a boolean"));
    }
    let Some(Value::Array(messages)) = row.remove("messages") else {
        return Err(Fault::new("invalid_type", "`messages` must be an array"));
    };
    Ok((messages, tools))
}

/// `instruction` and, where there is one, `input` are what the user says; `output` is the answer.
pub fn from_alpaca(mut row: Map<String, Value>) -> Result<Chat, Fault> {
    record::only(&row, &["instruction", "input", "output"], "the row")?;
    let mut question = record::text(&mut row, "instruction")?;
    let answer = record::text(&mut row, "output")?;
    let input = if row.contains_key("input") { record::text(&mut row, "input")? } else { String::new() };
    if !input.is_empty() {
        question = format!("{question}\n\n{input}");
    }
    let messages = vec![json!({"role": "user", "content": question}), json!({"role": "assistant", "content": answer})];
    conversation(messages, None)
}

/// `id` names the row and says nothing to the model; an empty system text is no message.
pub fn from_sharegpt(mut row: Map<String, Value>) -> Result<Chat, Fault> {
    record::only(&row, &["conversations", "id"], "the row")?;
    let Some(Value::Array(turns)) = row.remove("conversations") else {
        return Err(Fault::new("invalid_type", "`conversations` must be an array"));
    };
    let mut messages = Vec::with_capacity(turns.len().min(MAX_MESSAGES));
    for (place, turn) in turns.into_iter().enumerate() {
        let Value::Object(mut turn) = turn else { return Err(not_an_object(place, &turn)) };
        record::only(&turn, &["from", "value"], &format!("message {place}"))?;
        let (from, value) = (record::text(&mut turn, "from")?, record::text(&mut turn, "value")?);
        let role = match from.as_str() {
            "system" if value.is_empty() => continue,
            "system" => "system",
            "human" | "user" => "user",
            "gpt" | "chatgpt" | "assistant" | "model" => "assistant",
            other => return Err(invalid(place, format!("`{}` is not a speaker that we know", shown(other)))),
        };
        messages.push(json!({"role": role, "content": value}));
    }
    conversation(messages, None)
}

pub(super) fn tools(value: Option<Value>) -> Result<Option<Vec<Value>>, Fault> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(tools)) if tools.iter().all(Value::is_object) => Ok((!tools.is_empty()).then_some(tools)),
        Some(_) => Err(Fault::new("invalid_type", "`tools` must be an array of objects")),
    }
}

pub(super) fn conversation(values: Vec<Value>, tools: Option<Vec<Value>>) -> Result<Chat, Fault> {
    let (messages, trained, assistants) = turns(values)?;
    if assistants == 0 {
        return Err(Fault::new("missing_assistant", "the conversation has no assistant message to learn from"));
    }
    if trained.is_empty() {
        return Err(Fault::new("no_trained_tokens", "every assistant message has weight 0"));
    }
    Ok(Chat { messages, tools, trained })
}

/// Whether a row of messages asks for an answer instead of giving one.
pub fn is_question(row: &Map<String, Value>) -> bool {
    let last = row.get("messages").and_then(Value::as_array).and_then(|messages| messages.last());
    last.and_then(|message| message.get("role")).is_some_and(|role| role == "user" || role == "tool")
}

/// A conversation that ends with a question; other fields are the grader's.
pub fn question(mut row: Map<String, Value>) -> Result<Question, Fault> {
    if !is_question(&row) {
        let message = "the last message must be the user's: the answer is for the model to find";
        return Err(Fault::new("invalid_message", message));
    }
    let item = Value::Object(row.clone());
    row.retain(|key, _| ROW_FIELDS.contains(&key.as_str()));
    let (messages, tools) = fields(row)?;
    let (messages, _, _) = turns(messages)?;
    Ok(Question { messages, tools, item })
}

/// Messages in OpenAI's shape, places of those that are trained on, and how many are the assistant's.
fn turns(values: Vec<Value>) -> Result<(Vec<Value>, Vec<usize>, usize), Fault> {
    if values.len() > MAX_MESSAGES {
        let message = format!("{} messages are above the limit of {MAX_MESSAGES}", values.len());
        return Err(Fault::new("too_many_messages", message));
    }
    let mut messages: Vec<Value> = Vec::with_capacity(values.len());
    let (mut assistants, mut trained) = (0, Vec::new());
    for (place, value) in values.into_iter().enumerate() {
        let Value::Object(mut message) = value else { return Err(not_an_object(place, &value)) };
        let role = role(place, &message)?;
        let weight = check(place, &role, &mut message)?;
        follows(place, &role, messages.last())?;
        if role == "assistant" {
            assistants += 1;
            if weight {
                trained.push(place);
            }
        }
        messages.push(Value::Object(message));
    }
    Ok((messages, trained, assistants))
}

fn role(place: usize, message: &Map<String, Value>) -> Result<String, Fault> {
    match message.get("role").and_then(Value::as_str) {
        Some(role @ ("system" | "developer" | "user" | "assistant" | "tool")) => Ok(role.to_owned()),
        Some(other) => Err(invalid(place, format!("`{}` is not a role", shown(other)))),
        None => Err(invalid(place, "it needs a `role`")),
    }
}

/// Checks the fields of one message and brings its content to one string. Answers whether it is trained on.
fn check(place: usize, role: &str, message: &mut Map<String, Value>) -> Result<bool, Fault> {
    let known = match role {
        "assistant" => ASSISTANT_FIELDS,
        "tool" => TOOL_FIELDS,
        _ => SHARED_FIELDS,
    };
    record::only(message, known, &format!("message {place}"))?;
    for field in ["name", "tool_call_id"] {
        if message.get(field).is_some_and(|v| !v.is_string()) {
            return Err(invalid(place, format!("`{field}` must be a string")));
        }
    }
    if message.get("refusal").is_some_and(|v| !v.is_null()) {
        return Err(invalid(place, "`refusal` is not supported: write the refusal as `content`"));
    }
    message.remove("refusal");
    let weight = match message.remove("weight") {
        None => true,
        Some(value) if value.as_u64() == Some(1) => true,
        Some(value) if value.as_u64() == Some(0) => false,
        Some(_) => return Err(Fault::new("invalid_weight", format!("message {place}: `weight` must be 0 or 1"))),
    };
    let calls = has_calls(place, message)?;
    let content = content(place, message.remove("content"))?;
    if content.trim().is_empty() && !calls {
        return Err(Fault::new("empty_content", format!("message {place} ({role}) is empty")));
    }
    message.insert("content".to_owned(), Value::String(content));
    Ok(weight)
}

fn has_calls(place: usize, message: &Map<String, Value>) -> Result<bool, Fault> {
    let is_call = |call: &Value| call.get("function").and_then(|f| f.get("name")).is_some_and(Value::is_string);
    match message.get("tool_calls") {
        None => Ok(false),
        Some(Value::Array(calls)) if !calls.is_empty() && calls.iter().all(is_call) => Ok(true),
        Some(_) => Err(invalid(place, "`tool_calls` must be an array of calls, each with a function's `name`")),
    }
}

/// A string, or parts of type `text`, which are joined.
fn content(place: usize, value: Option<Value>) -> Result<String, Fault> {
    let part = |part: &Value| match (part.get("type").and_then(Value::as_str), part.get("text")) {
        (Some("text"), Some(Value::String(text))) => Ok(text.clone()),
        _ => Err(invalid(place, "only content parts of type `text` can be trained on")),
    };
    match value {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => parts.iter().map(part).collect(),
        Some(other) => Err(invalid(place, format!("`content` must be a string, not {}", record::kind(&other)))),
    }
}

/// The order of roles that means something in every template that we know; a stricter template says so itself.
fn follows(place: usize, role: &str, before: Option<&Value>) -> Result<(), Fault> {
    let before_role = before.and_then(|m| m.get("role")).and_then(Value::as_str);
    match (before_role, role) {
        (None, "tool") => Err(invalid(place, "a conversation cannot begin with a tool's answer")),
        (Some(_), "system" | "developer") => Err(invalid(place, format!("`{role}` may only be the first message"))),
        (Some("assistant"), "assistant") => Err(invalid(place, "two assistant messages follow each other")),
        (Some("tool"), "tool") => Ok(()),
        (Some(_), "tool") if before.is_some_and(|m| m.get("tool_calls").is_none()) => {
            Err(invalid(place, "a tool's answer must follow an assistant message with `tool_calls`"))
        }
        _ => Ok(()),
    }
}

fn invalid(place: usize, message: impl AsRef<str>) -> Fault {
    Fault::new("invalid_message", format!("message {place}: {}", message.as_ref()))
}

fn not_an_object(place: usize, value: &Value) -> Fault {
    invalid(place, format!("it must be an object, not {}", record::kind(value)))
}
