//! Adapters as they lie in the store: files, and a manifest that says what they must be.

use std::sync::Arc;

use futures::StreamExt;
use sha2::{Digest, Sha256};

use super::disk::{DiskCache, part};
use crate::{
    domain::{Manifest, ManifestFile, Snapshot},
    methods::{
        AdapterFiles,
        file::{CONFIG, WEIGHTS},
    },
    storage::{BlobStore, Key, StorageError},
};

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

/// An adapter's files as its manifest lists them.
pub fn listed(files: &AdapterFiles) -> Vec<ManifestFile> {
    let one = |name: &str, bytes: &[u8]| ManifestFile {
        name: name.to_owned(),
        bytes: bytes.len() as u64,
        sha256: sha256(bytes),
    };
    vec![one(CONFIG, &files.config), one(WEIGHTS, &files.weights)]
}

/// The adapter in a checkpoint.
pub fn adapter_of(snapshot: &Snapshot) -> Option<AdapterFiles> {
    let file = |name: &str| snapshot.files.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.clone());
    Some(AdapterFiles { config: file(CONFIG)?, weights: file(WEIGHTS)? })
}

/// An adapter's files, checked against its manifest, and the manifest against the generation that was asked for.
pub async fn read_adapter(
    store: &Arc<dyn BlobStore>,
    generation: &str,
) -> Result<(Manifest, AdapterFiles), ArtifactError> {
    download(store, None, generation).await
}

/// The same from the disk, or from the store by way of the disk.
pub async fn read_through(
    store: &Arc<dyn BlobStore>,
    disk: Option<&Arc<DiskCache>>,
    generation: &str,
) -> Result<(Manifest, AdapterFiles), ArtifactError> {
    if let Some(disk) = disk {
        let (disk, name) = (disk.clone(), generation.to_owned());
        if let Ok(Some(found)) = tokio::task::spawn_blocking(move || disk.get(&name)).await {
            return Ok(found);
        }
    }
    download(store, disk.map(AsRef::as_ref), generation).await
}

/// Hashed as it comes in, and written to the disk on the way.
async fn download(
    store: &Arc<dyn BlobStore>,
    disk: Option<&DiskCache>,
    generation: &str,
) -> Result<(Manifest, AdapterFiles), ArtifactError> {
    let key = |name: &str| Key::Adapter { generation: generation.to_owned(), name: name.to_owned() };
    let damaged = |name: &str| ArtifactError::Damaged(key(name).to_string());
    let manifest = store.get(&key(MANIFEST)).await?;
    let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|_| damaged(MANIFEST))?;
    if manifest.generation != generation || generation_of(&manifest.files) != generation {
        return Err(damaged(MANIFEST));
    }
    let mut copy = disk.and_then(|disk| disk.begin(&manifest));
    let mut files = AdapterFiles::default();
    for file in &manifest.files {
        let part = part(&mut files, &file.name).ok_or_else(|| damaged(&file.name))?;
        let (_, mut body) = store.get_stream(&key(&file.name)).await?;
        let mut hash = Sha256::new();
        while let Some(chunk) = body.next().await {
            let chunk = chunk?;
            // What is longer than it may be is not taken in to its end.
            if (part.len() + chunk.len()) as u64 > file.bytes {
                return Err(damaged(&file.name));
            }
            hash.update(&chunk);
            part.extend_from_slice(&chunk);
            copy = copy.filter(|copy| copy.write(&file.name, &chunk));
        }
        if part.len() as u64 != file.bytes || hex::encode(hash.finalize()) != file.sha256 {
            return Err(damaged(&file.name));
        }
    }
    if let Some(copy) = copy {
        copy.keep();
    }
    Ok((manifest, files))
}
