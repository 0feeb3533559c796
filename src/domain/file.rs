//! An uploaded file.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileRecord {
    /// `file-…`
    pub id: String,
    pub project: String,
    pub filename: String,
    /// `fine-tune`, `fine-tune-results`, `batch` …
    pub purpose: String,
    pub bytes: i64,
    /// SHA-256 of the content, hex.
    pub sha256: String,
    /// `uploaded`, `processed` or `error`.
    pub status: String,
    /// Why the file is in `error`, in one sentence.
    pub status_details: Option<String>,
    /// Unix seconds.
    pub created_at: i64,
}
