//! Files in parts: each part is durable when it is answered; completing joins them in the order that is asked for.

use std::sync::{Arc, Mutex};

use futures::{StreamExt, TryStreamExt, stream};
use md5::{Digest, Md5};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Fault, Problem, Service,
    fields::{Unsupported, in_range, read, refuse_unsupported},
    files::PURPOSES,
};
use crate::{
    db::DbError,
    domain::{
        Caller, FileRecord, id,
        upload::{PartRecord, UploadRecord, UploadStatus},
    },
    jobs::now,
    storage::{ByteStream, Key},
};

/// Seconds that an upload waits for its parts.
const LIFETIME: i64 = 3600;
/// Bytes of a part.
pub const MAX_PART: u64 = 64 << 20;
/// Parts of an upload.
const MAX_PARTS: usize = 10_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    filename: String,
    purpose: String,
    bytes: i64,
    /// Taken, since clients must send it; content says what a file is.
    #[serde(rename = "mime_type")]
    _mime_type: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Completion {
    part_ids: Vec<String>,
    md5: Option<String>,
}

/// OpenAI documents it; files here stay until they are deleted.
const UNSUPPORTED: [Unsupported; 1] = [Unsupported::always("expires_after")];

impl Service {
    pub async fn create_upload(&self, caller: &Caller, mut body: Map<String, Value>) -> Result<UploadRecord, Problem> {
        refuse_unsupported(&mut body, &UNSUPPORTED)?;
        let wanted: Wanted = read(body)?;
        if !PURPOSES.contains(&wanted.purpose.as_str()) {
            let message = format!("purpose {:?} is not one of {}", wanted.purpose, PURPOSES.join(", "));
            return Err(Problem::invalid("purpose", "invalid_purpose", message));
        }
        let most = i64::try_from(self.max_upload).unwrap_or(i64::MAX);
        let bytes = in_range("bytes", wanted.bytes, 1, most)?;
        self.forget_expired().await?;
        let created_at = now();
        let record = UploadRecord {
            id: id::new("upload_"),
            project: caller.project.clone(),
            filename: super::files::checked_name(&wanted.filename, "filename")?,
            purpose: wanted.purpose,
            bytes,
            status: UploadStatus::Pending,
            created_at,
            expires_at: created_at + LIFETIME,
            file_id: None,
        };
        self.db.insert_upload(caller, &record).await?;
        Ok(record)
    }

    pub async fn add_part(&self, caller: &Caller, upload: &str, body: ByteStream) -> Result<PartRecord, Problem> {
        self.pending(&caller.project, upload).await?;
        let part = id::new("part_");
        let key = Key::Part { upload: upload.to_owned(), id: part.clone() };
        let stored = self.store.put_stream(&key, body, MAX_PART).await?;
        let record =
            PartRecord { id: part, upload_id: upload.to_owned(), bytes: stored.bytes as i64, created_at: now() };
        let kept = match stored.bytes {
            0 => Err(Problem::invalid("data", "empty_file", "the part is empty")),
            _ => self.db.insert_part(&record).await.map_err(of_upload),
        };
        if let Err(problem) = kept {
            self.remove_part(&record).await;
            return Err(problem);
        }
        Ok(record)
    }

    /// The file that the parts make, in this order. They must come to the bytes that the upload said.
    pub async fn complete_upload(
        &self,
        caller: &Caller,
        upload: &str,
        body: Map<String, Value>,
    ) -> Result<(UploadRecord, FileRecord), Problem> {
        let Completion { part_ids, md5 } = read(body)?;
        let record = self.pending(&caller.project, upload).await?;
        let parts = self.db.parts(upload).await?;
        if part_ids.is_empty() || part_ids.len() > MAX_PARTS {
            let message = format!("part_ids has {} parts, outside 1 to {MAX_PARTS}", part_ids.len());
            return Err(Problem::invalid("part_ids", "out_of_range", message));
        }
        let mut chosen: Vec<&PartRecord> = Vec::with_capacity(part_ids.len());
        for (i, id) in part_ids.iter().enumerate() {
            let param = format!("part_ids.{i}");
            let Some(part) = parts.iter().find(|part| part.id == *id) else {
                return Err(Problem::invalid(param, "not_found", format!("no such part of {upload}: {id}")));
            };
            if chosen.iter().any(|before| before.id == *id) {
                return Err(Problem::invalid(param, "given_twice", format!("{id} stands twice in part_ids")));
            }
            chosen.push(part);
        }
        let held: i64 = chosen.iter().map(|part| part.bytes).sum();
        if held != record.bytes {
            let message = format!("the parts have {held} bytes, the upload said {}", record.bytes);
            return Err(Problem::invalid("part_ids", "wrong_size", message));
        }
        let store = self.store.clone();
        let keys: Vec<Key> = chosen.iter().map(|part| key(part)).collect();
        let content = stream::iter(keys)
            .then(move |key| {
                let store = store.clone();
                async move { store.get_stream(&key).await.map(|(_, bytes)| bytes) }
            })
            .try_flatten();
        let hash = Arc::new(Mutex::new(Md5::new()));
        let hashed = hash.clone();
        let content = content.inspect_ok(move |bytes| hashed.lock().unwrap_or_else(|e| e.into_inner()).update(bytes));
        let content = self.receive(content.boxed()).await?;
        let found = hex::encode(hash.lock().unwrap_or_else(|e| e.into_inner()).clone().finalize());
        if let Some(md5) = md5.filter(|md5| !md5.eq_ignore_ascii_case(&found)) {
            self.discard(&content.0).await;
            let message = format!("the parts have the MD5 {found}, not {md5}");
            return Err(Problem::invalid("md5", "wrong_hash", message));
        }
        let file = self.keep(caller, None, content, &record.filename, &record.purpose).await?;
        let ended = self.db.end_upload(caller, upload, UploadStatus::Completed, Some(&file.id)).await?;
        if !ended {
            // Cancelled or completed meanwhile: its file is another one, or none.
            self.delete_file(caller, &file.id).await?;
            return Err(no_longer_pending(upload));
        }
        for part in &parts {
            self.remove_part(part).await;
        }
        Ok((UploadRecord { status: UploadStatus::Completed, file_id: Some(file.id.clone()), ..record }, file))
    }

    pub async fn cancel_upload(&self, caller: &Caller, upload: &str) -> Result<UploadRecord, Problem> {
        let record = self.pending(&caller.project, upload).await?;
        let parts = self.db.parts(upload).await?;
        if !self.db.end_upload(caller, upload, UploadStatus::Cancelled, None).await? {
            return Err(no_longer_pending(upload));
        }
        for part in &parts {
            self.remove_part(part).await;
        }
        Ok(UploadRecord { status: UploadStatus::Cancelled, ..record })
    }

    async fn pending(&self, project: &str, id: &str) -> Result<UploadRecord, Problem> {
        let record = self.db.upload(project, id).await.map_err(|error| match error {
            DbError::NotFound => Problem::not_found("upload", id),
            error => error.into(),
        })?;
        if record.status == UploadStatus::Pending { Ok(record) } else { Err(no_longer_pending(id)) }
    }

    async fn remove_part(&self, part: &PartRecord) {
        if let Err(error) = self.store.delete(&key(part)).await {
            tracing::warn!(part.id = part.id, "an upload's part stays in the store: {error}");
        }
    }

    async fn forget_expired(&self) -> Result<(), Problem> {
        for part in self.db.expire_uploads().await? {
            self.remove_part(&part).await;
        }
        Ok(())
    }
}

fn key(part: &PartRecord) -> Key {
    Key::Part { upload: part.upload_id.clone(), id: part.id.clone() }
}

fn no_longer_pending(id: &str) -> Problem {
    let message = format!("the upload {id} is no longer pending: it was completed or cancelled, or its hour ran out");
    Problem::new(Fault::Invalid, "invalid_upload_state", message).at("id")
}

fn of_upload(error: DbError) -> Problem {
    match error {
        DbError::Conflict(message) => Problem::invalid("data", "invalid_upload_state", message),
        error => error.into(),
    }
}
