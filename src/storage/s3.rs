//! Blobs in S3 or a server that speaks it. Hashes are our own: other servers' checksums differ.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use aws_config::{BehaviorVersion, Region, retry::RetryConfig, timeout::TimeoutConfig};
use aws_sdk_s3::{
    Client,
    config::{RequestChecksumCalculation, ResponseChecksumValidation},
    error::{DisplayErrorContext, ProvideErrorMetadata},
    primitives::ByteStream as Body,
    types::{CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier},
};
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream};
use sha2::{Digest, Sha256};

use super::{BlobStore, ByteStream, Key, StorageError, Stored};

/// Parts of a multipart upload; smaller blobs go in one request.
const PART: usize = 8 << 20;

/// What differs from AWS's own; credentials and the rest come from the usual AWS variables and files.
#[derive(Clone, Debug, Default)]
pub struct S3Settings {
    /// Another server than AWS; buckets are then in the path.
    pub endpoint: Option<String>,
    pub region: Option<String>,
    /// Access key and secret, in place of the usual sources.
    pub credentials: Option<(String, String)>,
}

pub struct S3Store {
    client: Client,
    bucket: String,
    prefix: String,
}

/// What a failed request means for the caller.
fn failed<E: ProvideErrorMetadata + std::error::Error + 'static>(key: &str, error: E) -> StorageError {
    match error.code() {
        Some("NoSuchKey" | "NotFound" | "404") => StorageError::NotFound(key.to_owned()),
        _ => StorageError::Unavailable(format!("s3, {key}: {}", DisplayErrorContext(&error))),
    }
}

impl S3Store {
    pub async fn connect(bucket: &str, prefix: &str, settings: &S3Settings) -> Result<Self, StorageError> {
        let timeouts =
            TimeoutConfig::builder().connect_timeout(Duration::from_secs(5)).read_timeout(Duration::from_secs(30));
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .retry_config(RetryConfig::standard().with_max_attempts(4))
            .timeout_config(timeouts.build());
        if let Some(region) = &settings.region {
            loader = loader.region(Region::new(region.clone()));
        }
        if let Some(endpoint) = &settings.endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        if let Some((id, secret)) = &settings.credentials {
            loader =
                loader.credentials_provider(aws_sdk_s3::config::Credentials::new(id, secret, None, None, "settings"));
        }
        let shared = loader.load().await;
        let is_aws = shared.endpoint_url().is_none();
        let config = aws_sdk_s3::config::Builder::from(&shared)
            .force_path_style(!is_aws)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .build();
        let prefix = prefix.trim_matches('/');
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(Self { client: Client::from_conf(config), bucket: bucket.to_owned(), prefix })
    }

    fn name(&self, key: &Key) -> String {
        format!("{}{}", self.prefix, key.path())
    }

    /// The request is a task of its own: it ends also when nobody waits for it any more, and what it began is aborted.
    async fn begin(&self, name: &str) -> Result<Arc<Multipart>, StorageError> {
        let (client, bucket, name) = (self.client.clone(), self.bucket.clone(), name.to_owned());
        let began = tokio::spawn(async move {
            let request = client.create_multipart_upload().bucket(&bucket).key(&name);
            let created = request.send().await.map_err(|e| failed(&name, e))?;
            let id = created.upload_id;
            let id = id.ok_or_else(|| StorageError::Unavailable(format!("s3, {name}: no upload id")))?;
            Ok(Arc::new(Multipart { client, bucket, name, id, is_complete: AtomicBool::new(false) }))
        });
        began.await.map_err(|e| StorageError::Unavailable(format!("s3: {e}")))?
    }
}

/// An upload whose parts take room until it is completed or aborted. Dropping this aborts it: after an error, or when
/// nobody waits for the upload any more. A part on its way holds it too: one that arrives behind the abort would stay.
struct Multipart {
    client: Client,
    bucket: String,
    name: String,
    id: String,
    is_complete: AtomicBool,
}

impl Multipart {
    async fn part(self: &Arc<Self>, number: i32, bytes: Bytes) -> Result<CompletedPart, StorageError> {
        let upload = self.clone();
        let sent = tokio::spawn(async move {
            let request = upload.client.upload_part().bucket(&upload.bucket).key(&upload.name).upload_id(&upload.id);
            let sent = request.part_number(number).body(Body::from(bytes)).send().await;
            sent.map_err(|e| failed(&upload.name, e))
        });
        let sent = sent.await.map_err(|e| StorageError::Unavailable(format!("s3: {e}")))??;
        Ok(CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag).build())
    }

    async fn complete(&self, parts: Vec<CompletedPart>) -> Result<(), StorageError> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let request = self.client.complete_multipart_upload().bucket(&self.bucket).key(&self.name).upload_id(&self.id);
        request.multipart_upload(parts).send().await.map_err(|e| failed(&self.name, e))?;
        self.is_complete.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Multipart {
    fn drop(&mut self) {
        if *self.is_complete.get_mut() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let abort = self.client.abort_multipart_upload().bucket(&self.bucket).key(&self.name).upload_id(&self.id);
        let name = std::mem::take(&mut self.name);
        runtime.spawn(async move {
            if let Err(e) = abort.send().await {
                tracing::warn!(name, "an upload could not be aborted: {}", DisplayErrorContext(&e));
            }
        });
    }
}

/// Counts and hashes what passes.
struct Counter {
    bytes: u64,
    limit: u64,
    hash: Sha256,
    /// What came behind the last full part.
    rest: BytesMut,
}

impl Counter {
    /// The next part: full, or the last one.
    async fn fill(&mut self, body: &mut ByteStream) -> Result<Bytes, StorageError> {
        while self.rest.len() < PART {
            let Some(chunk) = body.next().await else { break };
            let chunk = chunk?;
            self.bytes += chunk.len() as u64;
            if self.bytes > self.limit {
                return Err(StorageError::TooLarge { limit: self.limit });
            }
            self.hash.update(&chunk);
            self.rest.extend_from_slice(&chunk);
        }
        Ok(self.rest.split_to(self.rest.len().min(PART)).freeze())
    }

    fn stored(self) -> Stored {
        Stored { bytes: self.bytes, sha256: hex::encode(self.hash.finalize()) }
    }
}

#[async_trait]
impl BlobStore for S3Store {
    async fn put_stream(&self, key: &Key, mut body: ByteStream, limit: u64) -> Result<Stored, StorageError> {
        let name = self.name(key);
        let mut counter = Counter { bytes: 0, limit, hash: Sha256::new(), rest: BytesMut::new() };
        let first = counter.fill(&mut body).await?;
        if first.len() < PART {
            let request = self.client.put_object().bucket(&self.bucket).key(&name).body(Body::from(first));
            request.send().await.map_err(|e| failed(&name, e))?;
            return Ok(counter.stored());
        }
        let upload = self.begin(&name).await?;
        let (mut parts, mut next) = (Vec::new(), Some(first));
        while let Some(part) = next {
            parts.push(upload.part(parts.len() as i32 + 1, part).await?);
            let part = counter.fill(&mut body).await?;
            next = (!part.is_empty()).then_some(part);
        }
        upload.complete(parts).await?;
        Ok(counter.stored())
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<Stored, StorageError> {
        let limit = body.len() as u64;
        self.put_stream(key, stream::iter([Ok(body)]).boxed(), limit).await
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StorageError> {
        let (size, mut body) = self.get_stream(key).await?;
        let mut bytes = BytesMut::new();
        while let Some(chunk) = body.next().await {
            bytes.extend_from_slice(&chunk?);
        }
        if bytes.len() as u64 != size {
            return Err(StorageError::Unavailable(format!("s3, {key}: {} of {size} bytes came", bytes.len())));
        }
        Ok(bytes.freeze())
    }

    async fn get_stream(&self, key: &Key) -> Result<(u64, ByteStream), StorageError> {
        let name = self.name(key);
        let request = self.client.get_object().bucket(&self.bucket).key(&name);
        let found = request.send().await.map_err(|e| failed(&name, e))?;
        let size = u64::try_from(found.content_length.unwrap_or(0)).unwrap_or(0);
        let body = stream::unfold(Some(found.body), move |body| {
            let name = name.clone();
            async move {
                let mut body = body?;
                match body.next().await? {
                    Ok(chunk) => Some((Ok(chunk), Some(body))),
                    Err(e) => Some((Err(StorageError::Unavailable(format!("s3, {name}: {e}"))), None)),
                }
            }
        });
        Ok((size, body.boxed()))
    }

    async fn size(&self, key: &Key) -> Result<u64, StorageError> {
        let name = self.name(key);
        let request = self.client.head_object().bucket(&self.bucket).key(&name);
        let found = request.send().await.map_err(|e| match e.as_service_error() {
            Some(service) if service.is_not_found() => StorageError::NotFound(name.clone()),
            _ => failed(&name, e),
        })?;
        Ok(u64::try_from(found.content_length.unwrap_or(0)).unwrap_or(0))
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        let name = self.name(key);
        match self.client.delete_object().bucket(&self.bucket).key(&name).send().await.map_err(|e| failed(&name, e)) {
            Err(StorageError::NotFound(_)) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    async fn delete_checkpoints(&self, job: &str) -> Result<(), StorageError> {
        let prefix = format!("{}{}", self.prefix, Key::checkpoints_of(job));
        let mut pages = self.client.list_objects_v2().bucket(&self.bucket).prefix(&prefix).into_paginator().send();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|e| failed(&prefix, e))?;
            let names = page.contents.unwrap_or_default().into_iter().filter_map(|object| object.key);
            let names: Vec<_> = names.filter_map(|name| ObjectIdentifier::builder().key(name).build().ok()).collect();
            if names.is_empty() {
                continue;
            }
            let names = Delete::builder().set_objects(Some(names)).build();
            let names = names.map_err(|e| StorageError::Unavailable(format!("s3, {prefix}: {e}")))?;
            let request = self.client.delete_objects().bucket(&self.bucket).delete(names);
            request.send().await.map_err(|e| failed(&prefix, e))?;
        }
        Ok(())
    }
}
