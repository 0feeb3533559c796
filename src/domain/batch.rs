//! Many requests as one file, answered when the server has time.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BatchStatus {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

impl BatchStatus {
    const ALL: [Self; 8] = [
        Self::Validating,
        Self::Failed,
        Self::InProgress,
        Self::Finalizing,
        Self::Completed,
        Self::Expired,
        Self::Cancelling,
        Self::Cancelled,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

/// What the requests of a batch ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Endpoint {
    Chat,
    Completions,
    Embeddings,
}

impl Endpoint {
    pub const ALL: [Self; 3] = [Self::Chat, Self::Completions, Self::Embeddings];

    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
        }
    }

    pub fn parse(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|endpoint| endpoint.path() == path)
    }
}

/// What is wrong with a batch's file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BatchError {
    pub code: String,
    pub message: String,
    /// The field of the line.
    pub param: Option<String>,
    /// From 1.
    pub line: Option<u64>,
}

/// A row of the batches table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchRecord {
    /// `batch_…`
    pub id: String,
    pub project: String,
    pub endpoint: Endpoint,
    pub input_file: String,
    pub completion_window: String,
    pub status: BatchStatus,
    pub errors: Vec<BatchError>,
    /// The model that all requests name, if they name one.
    pub model: Option<String>,
    pub metadata: Option<serde_json::Value>,
    pub output_file: Option<String>,
    pub error_file: Option<String>,
    /// Requests: all, answered, and those without an answer or with an error.
    pub total: i64,
    pub completed: i64,
    pub failed: i64,
    pub input_tokens: i64,
    pub output_tokens: i64,
    /// Unix seconds, as the others.
    pub created_at: i64,
    pub expires_at: i64,
    pub in_progress_at: Option<i64>,
    pub finalizing_at: Option<i64>,
    pub completed_at: Option<i64>,
    pub failed_at: Option<i64>,
    pub expired_at: Option<i64>,
    pub cancelling_at: Option<i64>,
    pub cancelled_at: Option<i64>,
    /// The number of the current attempt; every write of a runner carries it.
    pub fence: i64,
}

/// What became of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchLine {
    /// From 1.
    pub line: i64,
    /// Goes to the output file; else to the error file.
    pub is_ok: bool,
    /// One line of JSON.
    pub output: String,
    pub input_tokens: i64,
    pub output_tokens: i64,
}
