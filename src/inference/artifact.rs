//! Adapters as they lie in the store: files, and a manifest that says what they must be.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::{
    domain::{Manifest, ManifestFile},
    methods::AdapterFiles,
    storage::{BlobStore, Key, StorageError},
};

/// The names of an adapter's files in the store and in PEFT's directory.
pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";
pub const MANIFEST: &str = "manifest.json";

#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("{0} is damaged in the store")]
    Damaged(String),
}

/// In hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// The identity of files: SHA-256 over their names and hashes.
pub fn generation_of(files: &[ManifestFile]) -> String {
    let mut hash = Sha256::new();
    for file in files {
        hash.update(format!("{} {} {}\n", file.name, file.bytes, file.sha256));
    }
    hex::encode(hash.finalize())
}

/// An adapter's files, checked against its manifest, and the manifest against the generation that was asked for.
pub async fn read_adapter(
    store: &Arc<dyn BlobStore>,
    generation: &str,
) -> Result<(Manifest, AdapterFiles), ArtifactError> {
    let key = |name: &str| Key::Adapter { generation: generation.to_owned(), name: name.to_owned() };
    let manifest = store.get(&key(MANIFEST)).await?;
    let manifest: Manifest =
        serde_json::from_slice(&manifest).map_err(|_| ArtifactError::Damaged(key(MANIFEST).to_string()))?;
    if manifest.generation != generation || generation_of(&manifest.files) != generation {
        return Err(ArtifactError::Damaged(key(MANIFEST).to_string()));
    }
    let mut files = AdapterFiles::default();
    for file in &manifest.files {
        let bytes = store.get(&key(&file.name)).await?;
        if bytes.len() as u64 != file.bytes || sha256(&bytes) != file.sha256 {
            return Err(ArtifactError::Damaged(key(&file.name).to_string()));
        }
        match file.name.as_str() {
            CONFIG => files.config = bytes.to_vec(),
            WEIGHTS => files.weights = bytes.to_vec(),
            _ => return Err(ArtifactError::Damaged(key(&file.name).to_string())),
        }
    }
    Ok((manifest, files))
}
