//! What the files of a Hugging Face directory say about text.

use std::{fs, io::ErrorKind, path::Path, sync::OnceLock};

use serde_json::Value;

use super::{ChatTemplate, Text, TextError, Tokenizer, stop_ids};
use crate::formats::FormatError;

pub(super) fn text(dir: &Path) -> Result<Text, TextError> {
    let tokenizer_json = dir.join("tokenizer.json");
    let Some(json) = read(&tokenizer_json)? else {
        return Err(TextError::Tokenizer(format!("{} does not exist", tokenizer_json.display())));
    };
    let mut tokenizer = Tokenizer::from_json(&json)?;
    let config = json_file(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let generation = json_file(&dir.join("generation_config.json"))?.unwrap_or_default();
    let model = json_file(&dir.join("config.json"))?.unwrap_or_default();

    let (bos_token, eos_token) = (token_text(&config["bos_token"]), token_text(&config["eos_token"]));
    let bos = bos_token.and_then(|token| tokenizer.id(token));
    let is_added = match config["add_bos_token"].as_bool() {
        Some(is_added) => is_added,
        None => tokenizer.own_prefix()? == bos,
    };
    let eos_ids: Vec<u32> = [&generation["eos_token_id"], &model["eos_token_id"]].into_iter().flat_map(ids).collect();
    tokenizer.bos = bos.filter(|_| is_added);
    tokenizer.eos = eos_token.and_then(|token| tokenizer.id(token)).or_else(|| eos_ids.first().copied());

    let source = match read(&dir.join("chat_template.jinja"))? {
        Some(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        None => template_of(&config["chat_template"]).map(str::to_owned),
    };
    let template = source
        .map(|source| ChatTemplate::new(&source, bos_token.unwrap_or_default(), eos_token.unwrap_or_default()))
        .transpose()?;
    let stop_ids = stop_ids(&tokenizer, eos_ids);
    Ok(Text { tokenizer, template, stop_ids, grammars: OnceLock::new() })
}

/// A token is written as its text or as an object around it.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// One template, or a list of named ones of which `default` is the one for chat.
fn template_of(value: &Value) -> Option<&str> {
    let named = || value.as_array()?.iter().find(|entry| entry["name"] == "default")?["template"].as_str();
    value.as_str().or_else(named)
}

/// One id or a list.
fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value.as_array() {
        Some(values) => values.iter().filter_map(id).collect(),
        None => id(value).into_iter().collect(),
    }
}

fn json_file(path: &Path) -> Result<Option<Value>, TextError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let invalid = |error| FormatError::Invalid(format!("{}: {error}", path.display()));
    Ok(Some(serde_json::from_slice(&bytes).map_err(invalid)?))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FormatError::Io { path: path.display().to_string(), source }.into()),
    }
}
