//! Blobs as local files: written beside their place, synced, then renamed into it.

use std::{
    fs::Permissions,
    io::ErrorKind,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use sha2::{Digest, Sha256};
use tokio::{fs, io::AsyncWriteExt};
use tokio_util::io::ReaderStream;

use super::{BlobStore, ByteStream, Key, StorageError, Stored};

pub struct FileStore {
    root: PathBuf,
}

fn unavailable(what: &Path, error: std::io::Error) -> StorageError {
    StorageError::Unavailable(format!("{}: {error}", what.display()))
}

/// The end of a name that is not a blob's yet.
const PARTIAL: &str = ".partial";

/// A partial file that nobody has written to for this long has no writer: other processes may share the folder.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Removes what killed processes left half written. What cannot be looked at is left alone.
fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(found) = entry.metadata() else { continue };
        let path = entry.path();
        if found.is_dir() {
            sweep(&path);
            continue;
        }
        let is_partial = path.as_os_str().as_encoded_bytes().ends_with(PARTIAL.as_bytes());
        let is_old = found.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED));
        if is_partial && is_old {
            match std::fs::remove_file(&path) {
                Ok(()) => tracing::info!("removed {}, left by a process that was killed", path.display()),
                Err(error) => tracing::warn!("{} is left by a killed process: {error}", path.display()),
            }
        }
    }
}

impl FileStore {
    /// Makes the folder if it is missing.
    pub async fn open(root: PathBuf) -> Result<Self, StorageError> {
        fs::create_dir_all(&root).await.map_err(|e| unavailable(&root, e))?;
        let dir = root.clone();
        let swept = tokio::task::spawn_blocking(move || sweep(&dir)).await;
        swept.map_err(|e| unavailable(&root, std::io::Error::other(e)))?;
        Ok(Self { root })
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.root.join(key.path())
    }

    async fn write(&self, file: std::fs::File, body: ByteStream, limit: u64) -> Result<Stored, StorageError> {
        let (mut file, mut body) = (fs::File::from_std(file), body);
        let (mut bytes, mut hash) = (0u64, Sha256::new());
        while let Some(chunk) = body.next().await {
            let chunk = chunk?;
            bytes += chunk.len() as u64;
            if bytes > limit {
                return Err(StorageError::TooLarge { limit });
            }
            hash.update(&chunk);
            file.write_all(&chunk).await.map_err(|e| unavailable(&self.root, e))?;
        }
        // A write that is still under way can fail; the sync alone would not say so.
        file.flush().await.map_err(|e| unavailable(&self.root, e))?;
        file.sync_all().await.map_err(|e| unavailable(&self.root, e))?;
        Ok(Stored { bytes, sha256: hex::encode(hash.finalize()) })
    }
}

/// Makes durable which names a folder has.
async fn sync_dir(dir: &Path) -> Result<(), StorageError> {
    let opened = fs::File::open(dir).await.map_err(|e| unavailable(dir, e))?;
    opened.sync_all().await.map_err(|e| unavailable(dir, e))
}

#[async_trait]
impl BlobStore for FileStore {
    async fn put_stream(&self, key: &Key, body: ByteStream, limit: u64) -> Result<Stored, StorageError> {
        let path = self.path(key);
        let dir = path.parent().unwrap_or(&self.root).to_owned();
        fs::create_dir_all(&dir).await.map_err(|e| unavailable(&dir, e))?;
        // Removed when it is dropped: by an error, or because nobody waits for this any more.
        let mut partial = tempfile::Builder::new();
        let partial = partial.prefix("").suffix(PARTIAL).permissions(Permissions::from_mode(0o666));
        let (file, partial) = partial.tempfile_in(&dir).map_err(|e| unavailable(&dir, e))?.into_parts();
        let stored = self.write(file, body, limit).await?;
        partial.persist(&path).map_err(|e| unavailable(&path, e.error))?;
        // The folders too may be new, made by this or by another that has not come to here yet.
        for dir in dir.ancestors().take_while(|dir| dir.starts_with(&self.root)) {
            sync_dir(dir).await?;
        }
        Ok(stored)
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<Stored, StorageError> {
        let limit = body.len() as u64;
        self.put_stream(key, stream::iter([Ok(body)]).boxed(), limit).await
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StorageError> {
        let path = self.path(key);
        match fs::read(&path).await {
            Ok(bytes) => Ok(bytes.into()),
            Err(e) if e.kind() == ErrorKind::NotFound => Err(StorageError::NotFound(key.to_string())),
            Err(e) => Err(unavailable(&path, e)),
        }
    }

    async fn get_stream(&self, key: &Key) -> Result<(u64, ByteStream), StorageError> {
        let bytes = self.size(key).await?;
        let path = self.path(key);
        let file = fs::File::open(&path).await.map_err(|e| unavailable(&path, e))?;
        let chunks = ReaderStream::with_capacity(file, 256 * 1024);
        Ok((bytes, chunks.map(move |chunk| chunk.map_err(|e| unavailable(&path, e))).boxed()))
    }

    async fn size(&self, key: &Key) -> Result<u64, StorageError> {
        let path = self.path(key);
        match fs::metadata(&path).await {
            Ok(found) => Ok(found.len()),
            Err(e) if e.kind() == ErrorKind::NotFound => Err(StorageError::NotFound(key.to_string())),
            Err(e) => Err(unavailable(&path, e)),
        }
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        let path = self.path(key);
        match fs::remove_file(&path).await {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(unavailable(&path, e)),
            _ => Ok(()),
        }
    }

    async fn delete_checkpoints(&self, job: &str) -> Result<(), StorageError> {
        let dir = self.root.join(Key::checkpoints_of(job));
        match fs::remove_dir_all(&dir).await {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(unavailable(&dir, e)),
            _ => Ok(()),
        }
    }
}
