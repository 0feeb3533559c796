//! The trained result of a method.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ManifestFile {
    pub name: String,
    pub bytes: u64,
    /// hex
    pub sha256: String,
}

/// What an adapter is made of. Stored beside its files; nothing is loaded that does not match it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// SHA-256 over the names and hashes of the files, hex: the adapter's identity.
    pub generation: String,
    pub base_id: String,
    pub base_hash: String,
    /// `lora`, …: `MethodSpec::type_name`.
    pub method: String,
    pub files: Vec<ManifestFile>,
}

/// A named adapter in the database.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterRecord {
    /// `adapter-…`
    pub id: String,
    pub project: String,
    /// The name that requests use: `ft:<base>:<org>:<suffix>:<8 chars>`, with `:ckpt-step-N` for a checkpoint.
    pub model: String,
    /// The base's id.
    pub parent: String,
    /// `lora`, …
    pub method: String,
    pub generation: String,
    pub bytes: i64,
    pub created_at: i64,
    /// The job that made it; none for imports.
    pub job_id: Option<String>,
    /// The step of a checkpoint; none for final results and imports.
    pub step: Option<i64>,
    /// Places of the base's context that it takes before the text.
    #[serde(default)]
    pub virtual_tokens: i64,
}
