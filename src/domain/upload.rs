//! A file that comes in parts.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum UploadStatus {
    Pending,
    Completed,
    Cancelled,
    /// Its time ran out before it was completed.
    Expired,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UploadRecord {
    /// `upload_…`
    pub id: String,
    pub project: String,
    pub filename: String,
    pub purpose: String,
    /// What the parts must come to.
    pub bytes: i64,
    pub status: UploadStatus,
    pub created_at: i64,
    pub expires_at: i64,
    /// The file it became.
    pub file_id: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartRecord {
    /// `part_…`
    pub id: String,
    pub upload_id: String,
    pub bytes: i64,
    pub created_at: i64,
}
