//! Uploads and what is in them.

use std::io::Cursor;

use super::{Problem, Service, once::remembered};
use crate::{
    data::{self, DataError},
    db::Once,
    domain::{Caller, FileRecord, FileReport, id},
    inference::Resident,
    jobs::now,
    storage::{ByteStream, Key, Stored},
};

/// What files can be uploaded for.
pub const PURPOSES: [&str; 4] = ["fine-tune", "batch", "user_data", "evals"];

/// Characters of a file name.
const MAX_NAME: usize = 255;

impl Service {
    /// Takes a file's content before its purpose is known.
    pub async fn receive(&self, body: ByteStream) -> Result<(String, Stored), Problem> {
        let id = id::new("file-");
        let stored = self.store.put_stream(&Key::File { id: id.clone() }, body, self.max_upload).await?;
        Ok((id, stored))
    }

    /// Removes content whose request turned out to be wrong.
    pub async fn discard(&self, id: &str) {
        if let Err(error) = self.store.delete(&Key::File { id: id.to_owned() }).await {
            tracing::warn!(file.id = id, "an orphaned upload stays in the store: {error}");
        }
    }

    /// Makes an upload a file; or removes it, if a file was made of the same upload before.
    pub async fn keep(
        &self,
        caller: &Caller,
        idempotency_key: Option<String>,
        content: (String, Stored),
        filename: &str,
        purpose: &str,
    ) -> Result<FileRecord, Problem> {
        let id = content.0.clone();
        let once = remembered(idempotency_key, "files", &format!("{purpose}\n{}\n{filename}", content.1.sha256));
        let work = self.make_file(caller, once.as_ref(), content, filename, purpose);
        let file = self.once(&caller.project, once.as_ref(), work).await?;
        if file.id != id {
            self.discard(&id).await;
        }
        Ok(file)
    }

    async fn make_file(
        &self,
        caller: &Caller,
        once: Option<&Once>,
        (id, stored): (String, Stored),
        filename: &str,
        purpose: &str,
    ) -> Result<FileRecord, Problem> {
        if !PURPOSES.contains(&purpose) {
            let message = format!("purpose {purpose:?} is not one of {}", PURPOSES.join(", "));
            return Err(Problem::invalid("purpose", "invalid_purpose", message));
        }
        let filename = checked_name(filename, "file")?;
        if stored.bytes == 0 {
            return Err(Problem::invalid("file", "empty_file", "the file is empty"));
        }
        let details = match purpose {
            "fine-tune" => self.structural_error(&id).await?,
            _ => None,
        };
        let file = FileRecord {
            id,
            project: caller.project.clone(),
            filename,
            purpose: purpose.to_owned(),
            bytes: stored.bytes as i64,
            sha256: stored.sha256,
            status: if details.is_some() { "error" } else { "processed" }.to_owned(),
            status_details: details,
            created_at: now(),
        };
        self.db.insert_file(&caller.key, &file, once).await?;
        Ok(file)
    }

    /// What is wrong with a training file whatever the base, in one sentence.
    async fn structural_error(&self, id: &str) -> Result<Option<String>, Problem> {
        let bytes = self.store.get(&Key::File { id: id.to_owned() }).await?;
        let report = tokio::task::spawn_blocking(move || data::check_structure(Cursor::new(bytes))).await;
        let report = match report.map_err(Problem::internal)? {
            Ok(report) => report,
            Err(error) => return Ok(Some(error.to_string())),
        };
        Ok(first_error(&report))
    }

    /// What a job on this base would make of a file.
    pub async fn report(
        &self,
        file: &FileRecord,
        resident: &Resident,
        max_seq_len: u64,
    ) -> Result<FileReport, Problem> {
        let model = resident.base.info.id.clone();
        if let Some(report) = self.db.report(&file.id, &model, max_seq_len).await? {
            return Ok(report);
        }
        let bytes = self.store.get(&Key::File { id: file.id.clone() }).await?;
        let resident = resident.clone();
        let made = tokio::task::spawn_blocking(move || {
            let info = &resident.base.info;
            let context = data::Context {
                text: &resident.text,
                base_id: &info.id,
                max_seq_len: max_seq_len as usize,
                vocab: info.vocab,
            };
            data::validate(Cursor::new(bytes), &context)
        });
        let mut report = match made.await.map_err(Problem::internal)? {
            Ok(report) => report,
            Err(DataError::Read(error)) => return Err(Problem::internal(error)),
            Err(error) => return Err(Problem::invalid("training_file", "dataset_invalid", error.to_string())),
        };
        report.object = "file.report".to_owned();
        report.file_id = file.id.clone();
        self.db.keep_report(&report).await?;
        Ok(report)
    }

    pub async fn file(&self, project: &str, id: &str) -> Result<FileRecord, Problem> {
        self.db.file(project, id).await.map_err(|error| match error {
            crate::db::DbError::NotFound => Problem::not_found("file", id),
            error => error.into(),
        })
    }

    pub async fn delete_file(&self, caller: &Caller, id: &str) -> Result<(), Problem> {
        self.file(&caller.project, id).await?;
        if self.db.file_is_in_use(id).await? {
            let message = format!("{id} is read by a job or a batch that has not ended: cancel it first");
            return Err(Problem::new(super::Fault::Conflict, "file_in_use", message));
        }
        self.db.delete_file(caller, id).await?;
        self.discard(id).await;
        Ok(())
    }
}

/// The name without control characters.
pub(super) fn checked_name(filename: &str, param: &str) -> Result<String, Problem> {
    if filename.is_empty() || filename.chars().count() > MAX_NAME || filename.contains('\0') {
        let message = format!("the file's name is empty, above {MAX_NAME} characters or has a NUL");
        return Err(Problem::invalid(param, "invalid_filename", message));
    }
    Ok(filename.chars().filter(|c| !c.is_control()).collect())
}

/// `line 3: …`, and how many more there are.
pub fn first_error(report: &FileReport) -> Option<String> {
    let first = report.errors.first()?;
    let more = match report.error_count {
        0 | 1 => String::new(),
        n => format!(" ({n} lines are wrong; GET /v1/files/{{id}}/report lists them)"),
    };
    Some(format!("line {}: {}{more}", first.line, first.message))
}
