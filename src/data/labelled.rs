//! What texts and words are called: `{"text","label"}` and `{"tokens","tags"}`.

use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    Fault,
    record::{kind, only, text},
    shown,
};
use crate::domain::spec::{MAX_LABEL, label_fits};

/// A text and what it is called.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LabelledText {
    pub text: String,
    pub label: String,
}

/// Words, and what each is called.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaggedWords {
    pub words: Vec<String>,
    /// As many.
    pub tags: Vec<String>,
}

pub fn labelled(mut row: Map<String, Value>) -> Result<LabelledText, Fault> {
    only(&row, &["text", "label"], "the row")?;
    let said = take(&mut row, "label")?;
    Ok(LabelledText { text: some_text(&mut row)?, label: label("`label`", said)? })
}

pub fn tagged(mut row: Map<String, Value>) -> Result<TaggedWords, Fault> {
    only(&row, &["tokens", "tags"], "the row")?;
    let tags = array(take(&mut row, "tags")?, "tags")?;
    let words = words(&mut row)?;
    if words.len() != tags.len() {
        let message = format!("`tokens` has {} words and `tags` {}", words.len(), tags.len());
        return Err(Fault::new("labels_length", message));
    }
    let tags =
        tags.into_iter().enumerate().map(|(i, tag)| label(&format!("tag {i}"), tag)).collect::<Result<_, _>>()?;
    Ok(TaggedWords { words, tags })
}

/// The row's `text`, which says something.
pub fn some_text(row: &mut Map<String, Value>) -> Result<String, Fault> {
    let text = text(row, "text")?;
    if text.trim().is_empty() {
        return Err(Fault::new("empty_content", "`text` is empty"));
    }
    Ok(text)
}

/// The row's `tokens`, none of which is empty.
pub fn words(row: &mut Map<String, Value>) -> Result<Vec<String>, Fault> {
    let word = |(i, word): (usize, Value)| match word {
        Value::String(word) if !word.trim().is_empty() => Ok(word),
        Value::String(_) => Err(Fault::new("empty_content", format!("token {i} is empty"))),
        other => Err(Fault::new("invalid_type", format!("token {i} must be a string, not {}", kind(&other)))),
    };
    let words =
        array(take(row, "tokens")?, "tokens")?.into_iter().enumerate().map(word).collect::<Result<Vec<_>, _>>()?;
    if words.is_empty() { Err(Fault::new("empty_content", "`tokens` is empty")) } else { Ok(words) }
}

/// A name, or a whole number that is one.
fn label(place: &str, value: Value) -> Result<String, Fault> {
    let label = match value {
        Value::String(label) => label,
        Value::Number(number) if number.is_i64() || number.is_u64() => number.to_string(),
        other => {
            let message = format!("{place} must be a string or a whole number, not {}", kind(&other));
            return Err(Fault::new("invalid_label", message));
        }
    };
    if !label_fits(&label) {
        let message = format!("{place} is `{}`: a label has 1 to {MAX_LABEL} characters", shown(&label));
        return Err(Fault::new("invalid_label", message));
    }
    Ok(label)
}

fn take(row: &mut Map<String, Value>, field: &str) -> Result<Value, Fault> {
    let missing = || Fault::new("missing_field", format!("the row has no `{field}`"));
    row.remove(field).filter(|value| !value.is_null()).ok_or_else(missing)
}

fn array(value: Value, field: &str) -> Result<Vec<Value>, Fault> {
    match value {
        Value::Array(values) => Ok(values),
        other => Err(Fault::new("invalid_type", format!("`{field}` must be an array, not {}", kind(&other)))),
    }
}
