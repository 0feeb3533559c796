//! Adapters as they lie in the store: files, and a manifest that says what they must be.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, future::try_join_all, try_join};
use sha2::{Digest, Sha256};

use super::{
    disk::{Copy, DiskCache, Incoming, part},
    hands,
};
use crate::{
    domain::{Manifest, ManifestFile, Snapshot},
    methods::{
        AdapterFiles,
        file::{CONFIG, WEIGHTS},
    },
    storage::{BlobStore, ByteStream, Key, StorageError},
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
        if let Ok(Some(found)) = hands::begin(move || disk.get(&name)).await {
            return Ok(found);
        }
    }
    download(store, disk, generation).await
}

async fn download(
    store: &Arc<dyn BlobStore>,
    disk: Option<&Arc<DiskCache>>,
    generation: &str,
) -> Result<(Manifest, AdapterFiles), ArtifactError> {
    let damaged = |name: &str| ArtifactError::Damaged(key(generation, name).to_string());
    // All are asked for at once: one way to the store and back. What comes is read once it is known what it must be.
    let [manifest, config, weights] = [MANIFEST, CONFIG, WEIGHTS].map(|name| key(generation, name));
    let (manifest, (_, config), (_, weights)) =
        try_join!(store.get(&manifest), store.get_stream(&config), store.get_stream(&weights))?;
    let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|_| damaged(MANIFEST))?;
    if manifest.generation != generation || generation_of(&manifest.files) != generation {
        return Err(damaged(MANIFEST));
    }
    let copy = disk.and_then(|disk| disk.begin(&manifest)).map(Arc::new);
    let mut bodies = [(CONFIG, Some(config)), (WEIGHTS, Some(weights))];
    let mut all = Vec::new();
    for file in &manifest.files {
        let body = bodies.iter_mut().find(|(name, _)| *name == file.name).and_then(|(_, body)| body.take());
        all.push(read(body.ok_or_else(|| damaged(&file.name))?, generation, file, copy.clone()));
    }
    let mut files = AdapterFiles::default();
    for (file, bytes) in manifest.files.iter().zip(try_join_all(all).await?) {
        *part(&mut files, &file.name).ok_or_else(|| damaged(&file.name))? = bytes;
    }
    if let Some(copy) = copy.and_then(Arc::into_inner) {
        copy.keep();
    }
    Ok((manifest, files))
}

fn key(generation: &str, name: &str) -> Key {
    Key::Adapter { generation: generation.to_owned(), name: name.to_owned() }
}

/// Bytes that are hashed at once.
const PIECE: usize = 256 << 10;

/// A file: what has come of it is hashed, and written to the disk, while more comes.
async fn read(
    mut body: ByteStream,
    generation: &str,
    file: &ManifestFile,
    copy: Option<Arc<Incoming>>,
) -> Result<Vec<u8>, ArtifactError> {
    let key = key(generation, &file.name);
    let damaged = || ArtifactError::Damaged(key.to_string());
    let (name, size) = (file.name.clone(), file.bytes);
    let mut taken = hands::begin(move || Taken::new(copy, &name, size));
    let (mut come, mut waiting, mut pieces, mut is_open) = (0, 0, Vec::new(), true);
    while is_open {
        let chunk = body.next().await.transpose()?;
        is_open = chunk.is_some();
        if let Some(chunk) = chunk {
            (come, waiting) = (come + chunk.len() as u64, waiting + chunk.len());
            pieces.push(chunk);
        }
        // What is longer than it may be is not taken in to its end.
        if come > size {
            return Err(damaged());
        }
        if waiting >= PIECE || !is_open {
            let (pieces, before) = (std::mem::take(&mut pieces), taken.await.map_err(|_| damaged())?);
            taken = hands::begin(move || before.with(&pieces));
            waiting = 0;
        }
    }
    let Taken { hash, bytes, .. } = taken.await.map_err(|_| damaged())?;
    if come != size || hex::encode(hash.finalize()) != file.sha256 {
        return Err(damaged());
    }
    Ok(bytes)
}

/// What has come of a file.
struct Taken {
    hash: Sha256,
    bytes: Vec<u8>,
    copy: Option<Copy>,
}

impl Taken {
    fn new(copy: Option<Arc<Incoming>>, name: &str, size: u64) -> Self {
        // However large it is said to be.
        let room = size.min(64 << 20) as usize;
        let copy = copy.and_then(|copy| Copy::begin(copy, name));
        Self { hash: Sha256::new(), bytes: Vec::with_capacity(room), copy }
    }

    fn with(mut self, pieces: &[Bytes]) -> Self {
        for piece in pieces {
            self.hash.update(piece);
            self.bytes.extend_from_slice(piece);
            if let Some(copy) = &mut self.copy {
                copy.write(piece);
            }
        }
        self
    }
}
