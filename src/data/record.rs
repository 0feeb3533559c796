//! Row formats: which one a JSON object is, and what it says.

use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    Fault, Judgement, Preference, chat,
    labelled::{self, LabelledText, TaggedWords},
    preference, shown,
};
use crate::domain::dataset::RowKind;

/// What users write. Alpaca and ShareGPT rows are converted to chat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `{"messages":[{"role","content"}…]}`, maybe `tools`; `weight` 0 or 1 on assistant messages.
    Chat,
    /// `{"prompt","completion"}`
    PromptCompletion,
    /// `{"input_ids","labels"}`; a label of -100 is not trained on.
    Tokens,
    /// `{"instruction","input","output"}`
    Alpaca,
    /// `{"conversations":[{"from","value"}…]}`
    ShareGpt,
    /// `{"input":{"messages"},"preferred_output","non_preferred_output"}`, or `{"prompt","chosen","rejected"}`.
    Preference,
    /// `{"prompt","completion","label"}`
    Judged,
    /// `{"messages":[… the user's last], …}` with any other fields, for graders.
    Reinforcement,
    /// `{"text","label"}`
    LabelledText,
    /// `{"tokens","tags"}`
    TaggedTokens,
}

/// A row, checked for everything that needs no tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Record {
    Chat(Chat),
    Completion(Completion),
    Tokens(Tokens),
    Preference(Preference),
    Judged(Judgement),
    Question(Question),
    Labelled(LabelledText),
    Tagged(TaggedWords),
}

/// What shall be answered, and what graders need to judge the answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Question {
    pub messages: Vec<Value>,
    pub tools: Option<Vec<Value>>,
    /// The whole row.
    pub item: Value,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Chat {
    /// In OpenAI's shape, contents joined to strings, `weight` taken out.
    pub messages: Vec<Value>,
    pub tools: Option<Vec<Value>>,
    /// Places of the assistant messages that are trained on; never empty.
    pub trained: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Completion {
    pub prompt: String,
    pub completion: String,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tokens {
    pub ids: Vec<u32>,
    pub labels: Vec<Option<u32>>,
}

impl Format {
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Chat => "chat",
            Format::PromptCompletion => "prompt_completion",
            Format::Tokens => "tokens",
            Format::Alpaca => "alpaca",
            Format::ShareGpt => "sharegpt",
            Format::Preference => "preference",
            Format::Judged => "unpaired_preference",
            Format::Reinforcement => "reinforcement",
            Format::LabelledText => "labelled_text",
            Format::TaggedTokens => "tagged_tokens",
        }
    }

    /// By its name in reports.
    pub fn parse(name: &str) -> Option<Self> {
        use Format::*;
        let all = [
            Chat,
            PromptCompletion,
            Tokens,
            Alpaca,
            ShareGpt,
            Preference,
            Judged,
            Reinforcement,
            LabelledText,
            TaggedTokens,
        ];
        all.into_iter().find(|format| format.as_str() == name)
    }

    /// What its rows can be used for.
    pub fn kind(self) -> RowKind {
        match self {
            Format::Preference => RowKind::Pairs,
            Format::Judged => RowKind::Judged,
            Format::Reinforcement => RowKind::Prompts,
            Format::LabelledText => RowKind::Labelled,
            Format::TaggedTokens => RowKind::Tagged,
            _ => RowKind::Examples,
        }
    }

    /// The format of a row in a file of this format: questions and conversations look alike, and the first row tells.
    pub(super) fn within(self, first: Option<Self>, row: &Map<String, Value>) -> Self {
        let is_question = match first {
            Some(first) => first == Format::Reinforcement,
            None => chat::is_question(row),
        };
        if self == Format::Chat && is_question { Format::Reinforcement } else { self }
    }

    /// By the field that only this format has.
    pub(super) fn of(row: &Map<String, Value>) -> Result<Self, Fault> {
        let formats = [
            ("messages", Format::Chat),
            ("conversations", Format::ShareGpt),
            ("input_ids", Format::Tokens),
            ("instruction", Format::Alpaca),
            ("preferred_output", Format::Preference),
            ("preferred_completion", Format::Preference),
            ("non_preferred_output", Format::Preference),
            ("non_preferred_completion", Format::Preference),
            ("chosen", Format::Preference),
            ("rejected", Format::Preference),
            ("text", Format::LabelledText),
            ("tokens", Format::TaggedTokens),
            ("tags", Format::TaggedTokens),
            ("label", Format::Judged),
            ("prompt", Format::PromptCompletion),
            ("completion", Format::PromptCompletion),
        ];
        formats.into_iter().find(|(field, _)| row.contains_key(*field)).map(|(_, format)| format).ok_or_else(|| {
            let fields: Vec<_> = row.keys().take(8).map(|k| format!("`{}`", shown(k))).collect();
            let found = if fields.is_empty() { "none".to_owned() } else { fields.join(", ") };
            let wanted = "`messages`, `prompt` and `completion`, `input_ids` and `labels`, `input`, `preferred_output` \
                          and `non_preferred_output`, `prompt`, `chosen` and `rejected`, `prompt`, `completion` and \
                          `label`, `text` and `label`, or `tokens` and `tags`";
            Fault::new("unknown_format", format!("a row needs {wanted}; its fields are: {found}"))
        })
    }
}

/// The line's object.
pub(super) fn object(line: &str) -> Result<Map<String, Value>, Fault> {
    match serde_json::from_str(line) {
        Ok(Value::Object(row)) => Ok(row),
        Ok(other) => Err(Fault::new("not_an_object", format!("a row must be a JSON object, not {}", kind(&other)))),
        Err(error) => Err(Fault::new("invalid_json", format!("the line is not JSON: {}", reason(&error)))),
    }
}

impl Record {
    pub(super) fn parse(format: Format, row: Map<String, Value>) -> Result<Self, Fault> {
        match format {
            Format::Chat => chat::parse(row).map(Record::Chat),
            Format::ShareGpt => chat::from_sharegpt(row).map(Record::Chat),
            Format::Alpaca => chat::from_alpaca(row).map(Record::Chat),
            Format::PromptCompletion => completion(row).map(Record::Completion),
            Format::Tokens => tokens(row).map(Record::Tokens),
            Format::Preference => preference::pair(row).map(Record::Preference),
            Format::Judged => preference::judged(row).map(Record::Judged),
            Format::Reinforcement => chat::question(row).map(Record::Question),
            Format::LabelledText => labelled::labelled(row).map(Record::Labelled),
            Format::TaggedTokens => labelled::tagged(row).map(Record::Tagged),
        }
    }
}

pub(super) fn completion(mut row: Map<String, Value>) -> Result<Completion, Fault> {
    only(&row, &["prompt", "completion"], "the row")?;
    let (prompt, completion) = (text(&mut row, "prompt")?, text(&mut row, "completion")?);
    if completion.is_empty() {
        return Err(Fault::new("empty_content", "`completion` is empty"));
    }
    Ok(Completion { prompt, completion })
}

fn tokens(row: Map<String, Value>) -> Result<Tokens, Fault> {
    only(&row, &["input_ids", "labels"], "the row")?;
    let ids = integers(&row, "input_ids")?
        .into_iter()
        .map(|id| u32::try_from(id).map_err(|_| Fault::new("invalid_tokens", format!("{id} is not a token id"))))
        .collect::<Result<Vec<_>, _>>()?;
    let labels = integers(&row, "labels")?;
    if ids.is_empty() {
        return Err(Fault::new("empty_content", "`input_ids` is empty"));
    }
    if ids.len() != labels.len() {
        let message = format!("`input_ids` has {} values and `labels` {}", ids.len(), labels.len());
        return Err(Fault::new("labels_length", message));
    }
    // A label that is another id is nearly always a row whose labels were shifted already: the trainer shifts.
    let label = |(place, (id, label)): (usize, (&u32, &i64))| match *label {
        -100 => Ok(None),
        label if label == i64::from(*id) => Ok(Some(*id)),
        label => {
            let message = format!("label {label} at place {place} is neither -100 nor the token there ({id})");
            Err(Fault::new("invalid_labels", message))
        }
    };
    let labels = ids.iter().zip(&labels).enumerate().map(label).collect::<Result<_, _>>()?;
    Ok(Tokens { ids, labels })
}

fn integers(row: &Map<String, Value>, field: &str) -> Result<Vec<i64>, Fault> {
    let wrong = || Fault::new("invalid_tokens", format!("`{field}` must be an array of whole numbers"));
    let values = row.get(field).and_then(Value::as_array).ok_or_else(wrong)?;
    values.iter().map(|v| v.as_i64().ok_or_else(wrong)).collect()
}

/// A text field, taken out of the row.
pub(super) fn text(row: &mut Map<String, Value>, field: &str) -> Result<String, Fault> {
    match row.remove(field) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(Fault::new("invalid_type", format!("`{field}` must be a string, not {}", kind(&other)))),
        None => Err(Fault::new("missing_field", format!("the row has no `{field}`"))),
    }
}

/// Refuses fields that are not in `known`.
pub(super) fn only(row: &Map<String, Value>, known: &[&str], place: &str) -> Result<(), Fault> {
    match row.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(Fault::new("unknown_field", format!("{place} has an unknown field `{}`", shown(key)))),
        None => Ok(()),
    }
}

/// What a value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The parser's reason with the column; its own line number is always 1 and would mislead.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or(&text);
    format!("{reason} at column {}", error.column())
}
