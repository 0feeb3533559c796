//! What people say of answers, and the answers they say it of.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An answer that its request asked to keep (`store: true`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredCompletion {
    /// `chatcmpl-…`
    pub id: String,
    pub project: String,
    /// As the request named it.
    pub model: String,
    /// The adapter's generation, or the base's hash.
    pub fingerprint: String,
    pub created_at: i64,
    /// The conversation that was answered.
    pub messages: Vec<Value>,
    /// The answers, by `index`.
    pub choices: Vec<String>,
}

/// One judgement of one answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Judgement {
    Thumb {
        up: bool,
    },
    /// 1 (bad) to 5 (good).
    Rating {
        value: u8,
    },
    /// Better than another answer to the same conversation.
    Preference {
        over_completion: String,
        over_choice: usize,
    },
    /// What should have been said.
    Correction {
        text: String,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Feedback {
    /// `fb-…`
    pub id: String,
    pub project: String,
    pub completion_id: String,
    pub choice: usize,
    pub judgement: Judgement,
    pub comment: Option<String>,
    pub created_at: i64,
}
