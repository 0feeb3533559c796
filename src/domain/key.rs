//! Who calls.

use serde::{Deserialize, Serialize};

/// What a key may do. `All` includes the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    All,
    /// Chat, completions, the list of models.
    Inference,
    /// Files, jobs, adapters.
    Training,
    /// GET of anything.
    Read,
}

/// Who asks for a change: the project whose rows it may touch, and the key, for the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub project: String,
    pub key: String,
}

/// A key as the database knows it: only its hash.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApiKey {
    /// `key-…`
    pub id: String,
    pub project: String,
    /// SHA-256 of the key, hex.
    pub sha256: String,
    pub scopes: Vec<Scope>,
    pub created_at: i64,
    pub revoked_at: Option<i64>,
}
