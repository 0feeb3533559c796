//! The lines of a batch's file, read as they are needed.

use std::{collections::HashSet, io};

use futures::{Stream, StreamExt, stream};
use serde_json::{Map, Value};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use tokio_util::io::StreamReader;

use super::BatchContext;
use crate::{
    domain::{BatchError, BatchRecord, Endpoint},
    storage::{Key, StorageError},
};

/// Bytes of a line, and requests of a file.
const MAX_LINE: u64 = 16 << 20;
const MAX_REQUESTS: i64 = 50_000;
/// Errors that a batch lists.
const MAX_ERRORS: usize = 100;
/// Characters of a custom id.
const MAX_ID: usize = 512;

/// One request.
pub struct Asked {
    /// From 1.
    pub line: i64,
    pub custom_id: String,
    pub body: Map<String, Value>,
}

/// The requests of a file that was found right.
pub struct Checked {
    pub total: i64,
    /// What all of them name.
    pub model: Option<String>,
}

type Lines = Box<dyn AsyncBufRead + Send + Unpin>;

async fn open(context: &BatchContext, batch: &BatchRecord) -> Result<Lines, StorageError> {
    let (_, bytes) = context.store.get_stream(&Key::File { id: batch.input_file.clone() }).await?;
    Ok(Box::new(StreamReader::new(bytes.map(|chunk| chunk.map_err(io::Error::other)))))
}

/// The next line without its end; none at the file's.
async fn next(lines: &mut Lines) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    lines.take(MAX_LINE + 1).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    Ok(Some(line))
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(u8::is_ascii_whitespace)
}

/// A line as a request, or what is wrong with it.
fn read(line: &[u8], number: i64, endpoint: Endpoint) -> Result<Asked, BatchError> {
    let wrong = |code: &str, param: Option<&str>, message: String| BatchError {
        code: code.to_owned(),
        message,
        param: param.map(str::to_owned),
        line: u64::try_from(number).ok(),
    };
    if line.len() as u64 > MAX_LINE {
        return Err(wrong("line_too_long", None, format!("the line is above the limit of {MAX_LINE} bytes")));
    }
    let value = serde_json::from_slice::<Value>(line);
    let Ok(Value::Object(mut fields)) = value else {
        return Err(wrong("invalid_json_line", None, "the line is not a JSON object".to_owned()));
    };
    if let Some(name) = fields.keys().find(|name| !["custom_id", "method", "url", "body"].contains(&name.as_str())) {
        return Err(wrong("unknown_parameter", Some(name), format!("unknown field {name}")));
    }
    let custom_id = match fields.get("custom_id").and_then(Value::as_str) {
        Some(id) if (1..=MAX_ID).contains(&id.chars().count()) => id.to_owned(),
        _ => {
            let message = format!("custom_id is not a text of 1 to {MAX_ID} characters");
            return Err(wrong("invalid_custom_id", Some("custom_id"), message));
        }
    };
    if fields.get("method").and_then(Value::as_str) != Some("POST") {
        return Err(wrong("invalid_method", Some("method"), "method is not POST".to_owned()));
    }
    if fields.get("url").and_then(Value::as_str) != Some(endpoint.path()) {
        let message = format!("url is not the batch's endpoint {}", endpoint.path());
        return Err(wrong("invalid_url", Some("url"), message));
    }
    match fields.shift_remove("body") {
        Some(Value::Object(body)) => Ok(Asked { line: number, custom_id, body }),
        _ => Err(wrong("invalid_body", Some("body"), "body is not an object".to_owned())),
    }
}

/// Reads the whole file once: what is wrong with it by line, or how many requests it has.
pub async fn check(context: &BatchContext, batch: &BatchRecord) -> anyhow::Result<Result<Checked, Vec<BatchError>>> {
    let of_file = |code: &str, message: String| BatchError { code: code.to_owned(), message, param: None, line: None };
    let mut lines = match open(context, batch).await {
        Err(StorageError::NotFound(_)) => {
            return Ok(Err(vec![of_file("file_not_found", format!("{} is gone", batch.input_file))]));
        }
        opened => opened?,
    };
    let (mut errors, mut ids, mut models) = (Vec::new(), HashSet::new(), HashSet::new());
    let (mut number, mut total) = (0, 0);
    while let Some(line) = next(&mut lines).await? {
        number += 1;
        if is_blank(&line) {
            continue;
        }
        total += 1;
        match read(&line, number, batch.endpoint) {
            Ok(asked) => {
                if models.len() < 2 {
                    models.insert(asked.body.get("model").and_then(Value::as_str).map(str::to_owned));
                }
                if let Some(custom_id) = ids.replace(asked.custom_id) {
                    errors.push(BatchError {
                        code: "duplicate_custom_id".to_owned(),
                        message: format!("custom_id {custom_id:?} stands twice"),
                        param: Some("custom_id".to_owned()),
                        line: u64::try_from(number).ok(),
                    });
                }
            }
            Err(error) => errors.push(error),
        }
        if total > MAX_REQUESTS {
            errors = vec![of_file("too_many_requests", format!("the file has more than {MAX_REQUESTS} requests"))];
        }
        if errors.len() >= MAX_ERRORS || total > MAX_REQUESTS {
            break;
        }
    }
    if total == 0 {
        errors.push(of_file("empty_file", "the file has no requests".to_owned()));
    }
    let model = models.into_iter().next().flatten().filter(|_| errors.is_empty());
    Ok(if errors.is_empty() { Ok(Checked { total, model }) } else { Err(errors) })
}

/// The requests, in order.
pub async fn requests(
    context: &BatchContext,
    batch: &BatchRecord,
) -> anyhow::Result<impl Stream<Item = anyhow::Result<Asked>> + Send + use<>> {
    let (lines, endpoint) = (open(context, batch).await?, batch.endpoint);
    let all = stream::try_unfold((lines, 0), move |(mut lines, mut number)| async move {
        loop {
            let Some(line) = next(&mut lines).await? else { return anyhow::Ok(None) };
            number += 1;
            if is_blank(&line) {
                continue;
            }
            // It was right before: files do not change.
            let asked = read(&line, number, endpoint).map_err(|error| anyhow::anyhow!(error.message))?;
            return Ok(Some((asked, (lines, number))));
        }
    });
    Ok(all)
}
