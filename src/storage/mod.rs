//! Bytes by key: local files or S3, behind one trait. Keys are ours; nothing outside this room knows a path.

mod fs;
mod key;
mod s3;

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

pub use fs::FileStore;
pub use key::Key;
pub use s3::{S3Settings, S3Store};

/// What the store has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub bytes: u64,
    /// hex
    pub sha256: String,
}

#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("not in the store: {0}")]
    NotFound(String),
    /// Reading or writing again may help.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    #[error("{key} is damaged in the store: {detail}")]
    Corrupt { key: String, detail: String },
    #[error("the upload is larger than {limit} bytes")]
    TooLarge { limit: u64 },
    /// The caller's stream broke.
    #[error("the upload broke off: {0}")]
    Source(String),
}

pub type ByteStream = BoxStream<'static, Result<Bytes, StorageError>>;

/// Files and S3 behave alike; one test suite runs on both.
#[async_trait]
pub trait BlobStore: Send + Sync {
    /// Stores a stream of at most `limit` bytes. When it answers, the bytes are durable and their hash was computed on
    /// the way. An error leaves nothing under the key.
    async fn put_stream(&self, key: &Key, body: ByteStream, limit: u64) -> Result<Stored, StorageError>;
    async fn put(&self, key: &Key, body: Bytes) -> Result<Stored, StorageError>;
    async fn get(&self, key: &Key) -> Result<Bytes, StorageError>;
    async fn get_stream(&self, key: &Key) -> Result<(u64, ByteStream), StorageError>;
    async fn size(&self, key: &Key) -> Result<u64, StorageError>;
    /// Deleting what is not there is no error.
    async fn delete(&self, key: &Key) -> Result<(), StorageError>;
    /// Removes every checkpoint part of a job, of every attempt.
    async fn delete_checkpoints(&self, job: &str) -> Result<(), StorageError>;
}

/// A store by its URL: `file:DIR` or `s3://BUCKET/PREFIX`.
pub async fn open(url: &str, s3: &S3Settings) -> Result<Arc<dyn BlobStore>, StorageError> {
    if let Some(dir) = url.strip_prefix("file:") {
        return Ok(Arc::new(FileStore::open(PathBuf::from(dir)).await?));
    }
    let Some(rest) = url.strip_prefix("s3://") else {
        return Err(StorageError::Unavailable(format!("{url:?} is neither file:DIR nor s3://BUCKET/PREFIX")));
    };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    Ok(Arc::new(S3Store::connect(bucket, prefix, s3).await?))
}
