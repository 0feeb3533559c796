//! From answers to datasets: answers are kept when their request asks for it, people say what they think of them, and
//! what they said becomes a file to train on.

mod rows;

use std::collections::HashMap;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Fault, Problem, Service, fields::read, once::remembered};
use crate::{
    db::{DbError, FeedbackFilter, Page},
    domain::{Caller, Feedback, FileRecord, StoredCompletion, feedback::Judgement, id},
    jobs::now,
};

pub use rows::{RowFormat, Thresholds};

/// Feedback that one export reads.
const MAX_EXPORTED: usize = 100_000;
/// Characters of a comment.
const MAX_COMMENT: usize = 4096;
/// Characters of a correction.
const MAX_CORRECTION: usize = 100_000;

/// The body of `POST /v1/feedback`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    completion_id: String,
    choice: Option<u64>,
    thumb: Option<Thumb>,
    rating: Option<i64>,
    preferred_over: Option<Other>,
    correction: Option<String>,
    comment: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Thumb {
    Up,
    Down,
}

/// The answer that is worse: of the same completion, or of another one to the same conversation.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Other {
    completion_id: Option<String>,
    choice: Option<u64>,
}

/// Which feedback, and what counts as good and bad.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selection {
    pub since: Option<i64>,
    pub until: Option<i64>,
    pub model: Option<String>,
    pub min_rating: Option<u8>,
    pub max_rating: Option<u8>,
}

/// What an export made.
pub struct Exported {
    pub file: FileRecord,
    pub rows: usize,
    /// Feedback that gives no row of this format.
    pub unused: usize,
}

impl Service {
    /// Whether answers may be kept here at all.
    pub fn check_store(&self, store: bool) -> Result<(), Problem> {
        if store && self.retention_days == 0 {
            let message = "store: this server keeps no completions (its --completion-retention is 0)";
            return Err(Problem::invalid("store", "unsupported_parameter", message));
        }
        Ok(())
    }

    pub async fn keep_completion(&self, kept: StoredCompletion) -> Result<(), Problem> {
        Ok(self.db.keep_completion(&kept, self.retention()).await?)
    }

    fn retention(&self) -> i64 {
        i64::from(self.retention_days) * 24 * 3600
    }

    /// Drops what is kept for too long. Called before anything kept is read, so that nobody reads what should be gone,
    /// and now and then, so that it goes though nobody reads.
    pub async fn forget_old(&self) -> Result<(), Problem> {
        Ok(self.db.forget_completions(self.retention()).await?)
    }

    /// Newest first, after the feedback with id `after`.
    pub async fn feedback(&self, project: &str, after: Option<&str>, limit: usize) -> Result<Page<Feedback>, Problem> {
        self.forget_old().await?;
        Ok(self.db.feedback(project, after, limit).await?)
    }

    pub async fn completion(&self, project: &str, id: &str, param: &str) -> Result<StoredCompletion, Problem> {
        self.forget_old().await?;
        self.db.completion(project, id).await.map_err(|error| match error {
            DbError::NotFound => {
                let message = format!("no kept completion {id}: its request has to say \"store\": true");
                Problem::new(Fault::NotFound, "not_found", message).at(param)
            }
            error => error.into(),
        })
    }

    pub async fn delete_completion(&self, caller: &Caller, id: &str) -> Result<(), Problem> {
        self.completion(&caller.project, id, "id").await?;
        Ok(self.db.delete_completion(caller, id).await?)
    }

    pub async fn say(
        &self,
        caller: &Caller,
        key: Option<String>,
        body: Map<String, Value>,
    ) -> Result<Feedback, Problem> {
        let content = serde_json::to_string(&body).map_err(Problem::internal)?;
        let once = remembered(key, "feedback", &content);
        let body: Body = read(body)?;
        let work = async {
            let said = self.judge(&caller.project, body).await?;
            self.db.insert_feedback(caller, &said, once.as_ref()).await?;
            Ok(said)
        };
        self.once(&caller.project, once.as_ref(), work).await
    }

    async fn judge(&self, project: &str, body: Body) -> Result<Feedback, Problem> {
        let about = self.completion(project, &body.completion_id, "completion_id").await?;
        let choice = place(&about, body.choice.unwrap_or(0), "choice")?;
        if let Some(comment) = &body.comment {
            short(comment, "comment", MAX_COMMENT)?;
        }
        let mut found = Vec::new();
        if let Some(thumb) = body.thumb {
            found.push(Judgement::Thumb { up: matches!(thumb, Thumb::Up) });
        }
        if let Some(rating) = body.rating {
            let value = u8::try_from(super::fields::in_range("rating", rating, 1, 5)?).unwrap_or(5);
            found.push(Judgement::Rating { value });
        }
        if let Some(text) = body.correction {
            short(&text, "correction", MAX_CORRECTION)?;
            if text.is_empty() || text == about.choices[choice] {
                let message = "correction is empty or the answer itself";
                return Err(Problem::invalid("correction", "invalid_correction", message));
            }
            found.push(Judgement::Correction { text });
        }
        if let Some(other) = body.preferred_over {
            found.push(self.preference(project, &about, choice, other).await?);
        }
        let judgement = match (found.pop(), found.is_empty()) {
            (Some(one), true) => one,
            _ => {
                let message = "say exactly one of thumb, rating, preferred_over and correction";
                return Err(Problem::invalid("thumb", "invalid_feedback", message));
            }
        };
        Ok(Feedback {
            id: id::new("fb-"),
            project: project.to_owned(),
            completion_id: about.id,
            choice,
            judgement,
            comment: body.comment,
            created_at: now(),
        })
    }

    async fn preference(
        &self,
        project: &str,
        about: &StoredCompletion,
        choice: usize,
        other: Other,
    ) -> Result<Judgement, Problem> {
        let param = "preferred_over.completion_id";
        let worse = match &other.completion_id {
            Some(id) => self.completion(project, id, param).await?,
            None => about.clone(),
        };
        let over = place(&worse, other.choice.unwrap_or(0), "preferred_over.choice")?;
        if worse.messages != about.messages {
            let message = "preferred_over: the two answers are to different conversations";
            return Err(Problem::invalid(param, "different_conversations", message));
        }
        if worse.choices[over] == about.choices[choice] {
            let message = "preferred_over: the two answers are the same text";
            return Err(Problem::invalid(param, "equal_answers", message));
        }
        Ok(Judgement::Preference { over_completion: worse.id, over_choice: over })
    }

    pub async fn delete_feedback(&self, caller: &Caller, id: &str) -> Result<(), Problem> {
        self.db.delete_feedback(caller, id).await.map_err(|error| match error {
            DbError::NotFound => Problem::not_found("feedback", id),
            error => error.into(),
        })
    }

    /// Makes a dataset of what was said. Fails when nothing that was said gives a row.
    pub async fn export_feedback(
        &self,
        caller: &Caller,
        selection: &Selection,
        format: RowFormat,
    ) -> Result<Exported, Problem> {
        let thresholds = Thresholds::new(selection.min_rating, selection.max_rating)?;
        self.forget_old().await?;
        let Selection { since, until, model, .. } = selection.clone();
        let filter = FeedbackFilter { since, until, model };
        let said = self.db.feedback_of(&caller.project, &filter, MAX_EXPORTED + 1).await?;
        if said.len() > MAX_EXPORTED {
            let message = format!("more than {MAX_EXPORTED} feedbacks: narrow since and until");
            return Err(Problem::invalid("since", "out_of_range", message));
        }
        let mut completions = HashMap::new();
        for id in said.iter().flat_map(rows::completions_of) {
            if !completions.contains_key(id) {
                match self.db.completion(&caller.project, id).await {
                    Ok(kept) => _ = completions.insert(id.to_owned(), kept),
                    // The worse answer of a pair was deleted: the pair gives no row.
                    Err(DbError::NotFound) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        let made = rows::make(format, &said, &completions, thresholds);
        if made.rows.is_empty() {
            let message = format!("none of {} feedbacks gives a row of format {}", said.len(), format.name());
            return Err(Problem::invalid("format", "no_feedback", message));
        }
        let mut text = Vec::new();
        for row in &made.rows {
            serde_json::to_writer(&mut text, row).map_err(Problem::internal)?;
            text.push(b'\n');
        }
        let content = futures::stream::iter([Ok(Bytes::from(text))]);
        let content = self.receive(Box::pin(content)).await?;
        let name = format!("feedback-{}.jsonl", format.name());
        let file = self.keep(caller, None, content, &name, "fine-tune").await?;
        Ok(Exported { file, rows: made.rows.len(), unused: made.unused })
    }
}

fn place(about: &StoredCompletion, choice: u64, param: &str) -> Result<usize, Problem> {
    let n = about.choices.len();
    usize::try_from(choice).ok().filter(|choice| *choice < n).ok_or_else(|| {
        Problem::invalid(param, "out_of_range", format!("{param} is {choice}; {} has {n} choices", about.id))
    })
}

fn short(text: &str, param: &str, limit: usize) -> Result<(), Problem> {
    if text.chars().count() <= limit {
        return Ok(());
    }
    Err(Problem::invalid(param, "out_of_range", format!("{param} has more than {limit} characters")))
}
