//! What people prefer: pairs of answers, and single answers with a thumb up or down.
//!
//! Every side becomes a row of its own, chat or prompt and completion, with the answer trained on: rendering and
//! masks are those of demonstrations.

use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    Chat, Completion, Fault, chat,
    record::{completion, kind, only},
};

/// A prompt with its answer, which alone is trained on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Answer {
    Chat(Chat),
    Completion(Completion),
}

/// A better and a worse answer to the same prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Preference {
    pub chosen: Answer,
    pub rejected: Answer,
    /// By how much the first is better; 0 where the row does not say.
    pub margin: f64,
    /// That the first is better; 1 where the row does not say.
    pub probability: f64,
}

/// An answer and what somebody thought of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judgement {
    pub answer: Answer,
    pub is_desirable: bool,
}

/// OpenAI's two spellings and TRL's: `(preferred, other)`.
const SIDES: [(&str, &str); 3] = [
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
    ("chosen", "rejected"),
];

/// What comes before the answers.
enum Prompt {
    Text(String),
    Messages { messages: Vec<Value>, tools: Option<Vec<Value>> },
}

pub fn pair(mut row: Map<String, Value>) -> Result<Preference, Fault> {
    let named = |(a, b): &(&str, &str)| row.contains_key(*a) || row.contains_key(*b);
    let (preferred, other) = SIDES.into_iter().find(named).unwrap_or(SIDES[0]);
    let input = if preferred == "chosen" { "prompt" } else { "input" };
    only(&row, &[input, preferred, other, "margin", "probability", "judgement"], "the row")?;
    let margin = margin(row.remove("margin"))?;
    let probability = probability(row.remove("probability"))?;
    // Who judged and how: for whoever reads the file.
    row.remove("judgement");
    let (chosen, rejected) = (take(&mut row, preferred)?, take(&mut row, other)?);
    let (prompt, chosen, rejected) = match row.remove(input) {
        Some(prompt) => (read_prompt(input, prompt)?, chosen, rejected),
        None => common_prompt(chosen, rejected)?,
    };
    let chosen = answer(&prompt, preferred, chosen)?;
    let rejected = answer(&prompt, other, rejected)?;
    if chosen == rejected {
        return Err(Fault::new("equal_sides", format!("`{preferred}` and `{other}` are the same")));
    }
    Ok(Preference { chosen, rejected, margin, probability })
}

pub fn judged(mut row: Map<String, Value>) -> Result<Judgement, Fault> {
    only(&row, &["prompt", "completion", "label"], "the row")?;
    let label = take(&mut row, "label")?;
    let Value::Bool(is_desirable) = label else {
        return Err(Fault::new("invalid_label", format!("`label` must be true or false, not {}", kind(&label))));
    };
    let prompt = read_prompt("prompt", take(&mut row, "prompt")?)?;
    let answer = answer(&prompt, "completion", take(&mut row, "completion")?)?;
    Ok(Judgement { answer, is_desirable })
}

fn take(row: &mut Map<String, Value>, field: &str) -> Result<Value, Fault> {
    let missing = || Fault::new("missing_field", format!("the row has no `{field}`"));
    row.remove(field).filter(|value| !value.is_null()).ok_or_else(missing)
}

fn margin(value: Option<Value>) -> Result<f64, Fault> {
    match value {
        None | Some(Value::Null) => Ok(0.0),
        Some(value) => value
            .as_f64()
            .filter(|margin| margin.is_finite())
            .ok_or_else(|| Fault::new("invalid_margin", format!("`margin` must be a number, not {}", kind(&value)))),
    }
}

fn probability(value: Option<Value>) -> Result<f64, Fault> {
    match value {
        None | Some(Value::Null) => Ok(1.0),
        Some(value) => value.as_f64().filter(|p| (0.5..=1.0).contains(p)).ok_or_else(|| {
            Fault::new(
                "invalid_probability",
                "`probability` must be a number from 0.5 to 1: the first answer is the better one",
            )
        }),
    }
}

/// A text, messages, or OpenAI's `{"messages", "tools", "parallel_tool_calls"}`.
fn read_prompt(field: &str, value: Value) -> Result<Prompt, Fault> {
    match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(messages) => Ok(Prompt::Messages { messages, tools: None }),
        Value::Object(object) => {
            only(&object, chat::ROW_FIELDS, &format!("`{field}`"))?;
            let (messages, tools) = chat::fields(object)?;
            Ok(Prompt::Messages { messages, tools })
        }
        other => {
            let message = format!("`{field}` must be a string or messages, not {}", kind(&other));
            Err(Fault::new("invalid_type", message))
        }
    }
}

/// Two whole conversations without a prompt of their own: what they begin with alike is the prompt (TRL's rule).
fn common_prompt(chosen: Value, rejected: Value) -> Result<(Prompt, Value, Value), Fault> {
    let (Value::Array(mut chosen), Value::Array(mut rejected)) = (chosen, rejected) else {
        return Err(Fault::new("missing_field", "the row has no `prompt`"));
    };
    // The last message is an answer in any case.
    let most = chosen.len().min(rejected.len()).saturating_sub(1);
    let shared = chosen.iter().zip(&rejected).take(most).take_while(|(a, b)| a == b).count();
    let prompt = Prompt::Messages { messages: chosen.drain(..shared).collect(), tools: None };
    rejected.drain(..shared);
    Ok((prompt, Value::Array(chosen), Value::Array(rejected)))
}

/// One side as a row of its own.
fn answer(prompt: &Prompt, field: &str, value: Value) -> Result<Answer, Fault> {
    let named = |fault: Fault| Fault::new(fault.code, format!("`{field}`: {}", fault.message));
    match (prompt, value) {
        (Prompt::Text(prompt), Value::String(text)) => {
            let fields = [("prompt", prompt.clone()), ("completion", text)];
            let row = fields.into_iter().map(|(key, text)| (key.to_owned(), Value::String(text)));
            completion(row.collect()).map(Answer::Completion).map_err(named)
        }
        (Prompt::Messages { messages, tools }, Value::Array(answer)) => {
            if answer.is_empty() {
                return Err(named(Fault::new("empty_content", "there is no message")));
            }
            let mut all = messages.clone();
            all.iter_mut().for_each(only_read);
            all.extend(answer);
            chat::conversation(all, tools.clone()).map(Answer::Chat).map_err(named)
        }
        (Prompt::Text(_), other) => Err(Fault::new(
            "invalid_type",
            format!("`{field}` must be a string as the prompt is, not {}", kind(&other)),
        )),
        (Prompt::Messages { .. }, other) => {
            Err(Fault::new("invalid_type", format!("`{field}` must be an array of messages, not {}", kind(&other))))
        }
    }
}

/// The prompt's own answers are not what is compared.
fn only_read(message: &mut Value) {
    if message.get("role").is_some_and(|role| role == "assistant")
        && let Some(fields) = message.as_object_mut()
    {
        fields.insert("weight".to_owned(), 0.into());
    }
}
