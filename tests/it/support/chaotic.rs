//! A blob store that brings the wrong things on purpose.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use attune::storage::{BlobStore, ByteStream, Key, StorageError, Stored};
use bytes::Bytes;
use futures::{StreamExt, stream};

/// What happens to a blob on its way.
#[derive(Clone, Debug)]
pub enum Fault {
    /// One bit is another.
    Flipped,
    /// Its end is missing, and nothing says so.
    Truncated,
    /// It goes on behind its end.
    Longer,
    /// Another blob comes in its place.
    Swapped(Key),
    /// The connection ends in the middle.
    BrokenOff,
    /// The store does not answer.
    Away,
    /// It comes drop by drop.
    Slow(Duration),
    /// It is gone.
    Missing,
}

/// Faults by what keys end with; each for so many reads.
pub struct Chaotic {
    inner: Arc<dyn BlobStore>,
    faults: Mutex<HashMap<String, (Fault, usize)>>,
}

/// Bytes of a piece of a stream.
const PIECE: usize = 1500;

impl Chaotic {
    pub fn new(inner: Arc<dyn BlobStore>) -> Self {
        Self { inner, faults: Mutex::default() }
    }

    /// The next reads of keys that end so.
    pub fn set(&self, end: &str, fault: Fault, reads: usize) {
        self.faults.lock().unwrap().insert(end.to_owned(), (fault, reads));
    }

    pub fn heal(&self) {
        self.faults.lock().unwrap().clear();
    }

    fn fault(&self, key: &Key) -> Option<Fault> {
        let name = key.to_string();
        let mut faults = self.faults.lock().unwrap();
        let (_, (fault, left)) =
            faults.iter_mut().find(|(end, (_, left))| name.ends_with(end.as_str()) && *left > 0)?;
        *left -= 1;
        Some(fault.clone())
    }

    /// The pieces that come, and the pause before each.
    async fn read(&self, key: &Key) -> Result<(Vec<Result<Bytes, StorageError>>, Duration), StorageError> {
        let away = || StorageError::Unavailable("on purpose".to_owned());
        let fault = self.fault(key);
        let mut bytes = match &fault {
            Some(Fault::Away) => return Err(away()),
            Some(Fault::Missing) => return Err(StorageError::NotFound(key.to_string())),
            Some(Fault::Swapped(other)) => self.inner.get(other).await?.to_vec(),
            _ => self.inner.get(key).await?.to_vec(),
        };
        let middle = bytes.len() / 2;
        match fault {
            Some(Fault::Flipped) => bytes[middle] ^= 4,
            Some(Fault::Truncated | Fault::BrokenOff) => bytes.truncate(middle),
            Some(Fault::Longer) => bytes.extend_from_slice(&[7; 4000]),
            _ => {}
        }
        let mut pieces: Vec<_> = bytes.chunks(PIECE).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        if matches!(fault, Some(Fault::BrokenOff)) {
            pieces.push(Err(away()));
        }
        let pause = if let Some(Fault::Slow(pause)) = fault { pause } else { Duration::ZERO };
        Ok((pieces, pause))
    }
}

#[async_trait]
impl BlobStore for Chaotic {
    async fn put_stream(&self, key: &Key, body: ByteStream, limit: u64) -> Result<Stored, StorageError> {
        self.inner.put_stream(key, body, limit).await
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<Stored, StorageError> {
        self.inner.put(key, body).await
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StorageError> {
        let (pieces, pause) = self.read(key).await?;
        tokio::time::sleep(pause).await;
        Ok(pieces.into_iter().collect::<Result<Vec<_>, _>>()?.concat().into())
    }

    async fn get_stream(&self, key: &Key) -> Result<(u64, ByteStream), StorageError> {
        let size = self.inner.size(key).await.unwrap_or(0);
        let (pieces, pause) = self.read(key).await?;
        let pieces = stream::iter(pieces).then(move |piece| async move {
            tokio::time::sleep(pause).await;
            piece
        });
        Ok((size, pieces.boxed()))
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
