//! The files of results.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use super::{Answered, BatchContext, input::Asked};
use crate::{
    domain::{BatchLine, BatchRecord, FileRecord, id},
    jobs::now,
    storage::{Key, StorageError},
};

/// Lines that are read at once.
const PAGE: i64 = 500;

/// A line of the output file, or of the error file when the endpoint refused the request.
pub fn answered(asked: &Asked, answered: Answered) -> BatchLine {
    let usage = |name: &str| answered.body["usage"][name].as_i64().unwrap_or(0);
    let (input_tokens, output_tokens) = (usage("prompt_tokens"), usage("completion_tokens"));
    let response = json!({"status_code": answered.status, "request_id": answered.request_id, "body": answered.body});
    let is_ok = answered.status == 200;
    BatchLine { line: asked.line, is_ok, output: line(asked, response, Value::Null), input_tokens, output_tokens }
}

/// A line of the error file for a request that was never asked.
pub fn expired(asked: &Asked) -> BatchLine {
    let message = "the batch's completion window ran out before this request was answered";
    let error = json!({"code": "batch_expired", "message": message});
    let output = line(asked, Value::Null, error);
    BatchLine { line: asked.line, is_ok: false, output, input_tokens: 0, output_tokens: 0 }
}

fn line(asked: &Asked, response: Value, error: Value) -> String {
    let id = id::new("batch_req_");
    json!({"id": id, "custom_id": asked.custom_id, "response": response, "error": error}).to_string()
}

/// Writes one of the two files; none where it would be empty. Its id follows from the batch's, so that an attempt which
/// comes after a crash writes over what the one before left.
pub async fn write(context: &BatchContext, batch: &BatchRecord, is_ok: bool) -> anyhow::Result<Option<FileRecord>> {
    if context.db.batch_results(&batch.id, is_ok, 0, 1).await?.is_empty() {
        return Ok(None);
    }
    let kind = if is_ok { "output" } else { "error" };
    let id = format!("file-{}-{kind}", batch.id.trim_start_matches("batch_"));
    let (db, batch_id) = (context.db.clone(), batch.id.clone());
    let pages = stream::try_unfold(0, move |after| {
        let (db, batch_id) = (db.clone(), batch_id.clone());
        async move {
            let page = db.batch_results(&batch_id, is_ok, after, PAGE).await;
            let page = page.map_err(|error| StorageError::Source(error.to_string()))?;
            let Some((last, _)) = page.last() else { return Ok(None) };
            let (last, mut text) = (*last, String::new());
            for (_, line) in &page {
                text.push_str(line);
                text.push('\n');
            }
            Ok(Some((Bytes::from(text), last)))
        }
    });
    let stored = context.store.put_stream(&Key::File { id: id.clone() }, pages.into_stream().boxed(), u64::MAX).await?;
    Ok(Some(FileRecord {
        id,
        project: batch.project.clone(),
        filename: format!("{}_{kind}.jsonl", batch.id),
        purpose: "batch_output".to_owned(),
        bytes: i64::try_from(stored.bytes).unwrap_or(i64::MAX),
        sha256: stored.sha256,
        status: "processed".to_owned(),
        status_details: None,
        created_at: now(),
    }))
}
