//! A blob store that counts what is read from it, and that can be held up.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use attune::storage::{BlobStore, ByteStream, Key, StorageError, Stored};
use bytes::Bytes;
use tokio::sync::watch;

pub struct Watched {
    inner: Arc<dyn BlobStore>,
    reads: Mutex<HashMap<String, usize>>,
    is_open: watch::Sender<bool>,
}

impl Watched {
    pub fn new(inner: Arc<dyn BlobStore>) -> Self {
        Self { inner, reads: Mutex::default(), is_open: watch::Sender::new(true) }
    }

    /// From now on reads begin, but do not end before `open`.
    pub fn shut(&self) {
        self.is_open.send_replace(false);
    }

    pub fn open(&self) {
        self.is_open.send_replace(true);
    }

    /// How often each blob of a generation was read, the most read first.
    pub fn reads_of(&self, generation: &str) -> Vec<usize> {
        let reads = self.reads.lock().unwrap();
        let mut counts: Vec<usize> =
            reads.iter().filter(|(key, _)| key.contains(generation)).map(|(_, n)| *n).collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }
}

#[async_trait]
impl BlobStore for Watched {
    async fn put_stream(&self, key: &Key, body: ByteStream, limit: u64) -> Result<Stored, StorageError> {
        self.inner.put_stream(key, body, limit).await
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<Stored, StorageError> {
        self.inner.put(key, body).await
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StorageError> {
        *self.reads.lock().unwrap().entry(key.to_string()).or_default() += 1;
        self.is_open.subscribe().wait_for(|open| *open).await.unwrap();
        self.inner.get(key).await
    }

    async fn get_stream(&self, key: &Key) -> Result<(u64, ByteStream), StorageError> {
        *self.reads.lock().unwrap().entry(key.to_string()).or_default() += 1;
        self.is_open.subscribe().wait_for(|open| *open).await.unwrap();
        self.inner.get_stream(key).await
    }

    async fn size(&self, key: &Key) -> Result<u64, StorageError> {
        self.inner.size(key).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        self.inner.delete(key).await
    }

    async fn delete_checkpoints(&self, job: &str) -> Result<(), StorageError> {
        self.inner.delete_checkpoints(job).await
    }
}
