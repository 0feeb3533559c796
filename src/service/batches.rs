//! Batches: what a request for one asks, checked.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Fault, Problem, Service,
    fields::{Unsupported, check_metadata, read, refuse_unsupported},
    once::remembered,
};
use crate::{
    db::DbError,
    domain::{BatchRecord, BatchStatus, Caller, Endpoint, id},
    jobs::now,
};

/// The longest window, in seconds.
const DAY: i64 = 86_400;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    input_file_id: String,
    endpoint: String,
    completion_window: String,
    metadata: Option<Value>,
}

/// OpenAI documents it; files here stay until they are deleted.
const UNSUPPORTED: [Unsupported; 1] = [Unsupported::always("output_expires_after")];

impl Service {
    pub async fn create_batch(
        &self,
        caller: &Caller,
        idempotency_key: Option<String>,
        mut body: Map<String, Value>,
    ) -> Result<BatchRecord, Problem> {
        let once = remembered(idempotency_key, "batches", &Value::Object(body.clone()).to_string());
        refuse_unsupported(&mut body, &UNSUPPORTED)?;
        let wanted: Wanted = read(body)?;
        let work = async {
            let endpoint = Endpoint::parse(&wanted.endpoint).ok_or_else(|| {
                let known = Endpoint::ALL.map(Endpoint::path).join(", ");
                let message = format!("endpoint {:?} is not one of {known}", wanted.endpoint);
                Problem::invalid("endpoint", "out_of_range", message)
            })?;
            let seconds = window(&wanted.completion_window)?;
            if let Some(metadata) = &wanted.metadata {
                check_metadata(metadata)?;
            }
            let file = self.file(&caller.project, &wanted.input_file_id).await;
            let file = file.map_err(|problem| problem.at("input_file_id"))?;
            if file.purpose != "batch" {
                let message = format!("{} was uploaded for {}, not for batch", file.id, file.purpose);
                return Err(Problem::invalid("input_file_id", "wrong_purpose", message));
            }
            let created_at = now();
            let record = BatchRecord {
                id: id::new("batch_"),
                project: caller.project.clone(),
                endpoint,
                input_file: file.id,
                completion_window: wanted.completion_window.clone(),
                status: BatchStatus::Validating,
                errors: Vec::new(),
                model: None,
                metadata: wanted.metadata.clone(),
                output_file: None,
                error_file: None,
                total: 0,
                completed: 0,
                failed: 0,
                input_tokens: 0,
                output_tokens: 0,
                created_at,
                expires_at: created_at + seconds,
                in_progress_at: None,
                finalizing_at: None,
                completed_at: None,
                failed_at: None,
                expired_at: None,
                cancelling_at: None,
                cancelled_at: None,
                fence: 0,
            };
            self.db.insert_batch(&caller.key, &record, once.as_ref()).await?;
            Ok(record)
        };
        let record = self.once(&caller.project, once.as_ref(), work).await?;
        self.wake_batches.notify_waiters();
        Ok(record)
    }

    pub async fn batch(&self, project: &str, id: &str) -> Result<BatchRecord, Problem> {
        self.db.batch(project, id).await.map_err(|error| of_batch(error, id))
    }

    pub async fn cancel_batch(&self, caller: &Caller, id: &str) -> Result<BatchRecord, Problem> {
        let record = self.db.cancel_batch(caller, id).await.map_err(|error| of_batch(error, id))?;
        self.wake_batches.notify_waiters();
        Ok(record)
    }
}

fn of_batch(error: DbError, id: &str) -> Problem {
    match error {
        DbError::NotFound => Problem::not_found("batch", id),
        DbError::Conflict(message) => Problem::new(Fault::Conflict, "invalid_batch_state", message).at("id"),
        error => error.into(),
    }
}

/// `24h`, or less: a number of hours, minutes or seconds.
fn window(text: &str) -> Result<i64, Problem> {
    let unit = |last: char| match last {
        'h' => Some(3600),
        'm' => Some(60),
        's' => Some(1),
        _ => None,
    };
    let parsed = text.chars().last().and_then(|last| Some((text.strip_suffix(last)?, unit(last)?)));
    let seconds = parsed.and_then(|(number, unit)| number.parse::<i64>().ok()?.checked_mul(unit));
    match seconds.filter(|seconds| (1..=DAY).contains(seconds)) {
        Some(seconds) => Ok(seconds),
        None => {
            let message = format!("completion_window {text:?} is neither 24h nor a shorter time such as 90m or 30s");
            Err(Problem::invalid("completion_window", "out_of_range", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_at_most_a_day() {
        for (text, seconds) in [("24h", DAY), ("90m", 5400), ("30s", 30)] {
            assert_eq!(window(text).unwrap(), seconds);
        }
        for text in ["", "h", "25h", "0s", "-1h", "1d", "24", "9999999999999999999h", "1é"] {
            assert_eq!(window(text).unwrap_err().param.as_deref(), Some("completion_window"), "{text}");
        }
    }
}
