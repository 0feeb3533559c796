//! Blobs as local files: written beside their place, synced, then renamed into it.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
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

impl FileStore {
    pub async fn open(root: PathBuf) -> Result<Self, StorageError> {
        fs::create_dir_all(&root).await.map_err(|e| unavailable(&root, e))?;
        Ok(Self { root })
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.root.join(key.path())
    }

    async fn write(&self, partial: &Path, body: ByteStream, limit: u64) -> Result<Stored, StorageError> {
        let mut body = body;
        let mut file = fs::File::create(partial).await.map_err(|e| unavailable(partial, e))?;
        let (mut bytes, mut hash) = (0u64, Sha256::new());
        while let Some(chunk) = body.next().await {
            let chunk = chunk?;
            bytes += chunk.len() as u64;
            if bytes > limit {
                return Err(StorageError::TooLarge { limit });
            }
            hash.update(&chunk);
            file.write_all(&chunk).await.map_err(|e| unavailable(partial, e))?;
        }
        // A write that is still under way can fail; the sync alone would not say so.
        file.flush().await.map_err(|e| unavailable(partial, e))?;
        file.sync_all().await.map_err(|e| unavailable(partial, e))?;
        Ok(Stored { bytes, sha256: hex::encode(hash.finalize()) })
    }
}

/// Makes a rename durable.
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
        let partial = path.with_extension(format!("{}.partial", crate::domain::id::random(12)));
        let written = self.write(&partial, body, limit).await;
        let renamed = match written {
            Ok(stored) => fs::rename(&partial, &path).await.map_err(|e| unavailable(&path, e)).map(|()| stored),
            Err(error) => Err(error),
        };
        if renamed.is_err() {
            // Whatever happened, no half of a blob stays; the first error is the one to tell.
            _ = fs::remove_file(&partial).await;
        }
        let stored = renamed?;
        sync_dir(&dir).await?;
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
