//! `/v1/files`: datasets and results.

use axum::{
    Json,
    body::Body,
    extract::{
        FromRequest, Multipart, Request, State,
        multipart::{Field, MultipartError},
    },
    http::header::{CONTENT_LENGTH, CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::{Reading, Training},
    error::{ApiError, ErrorEnvelope},
    extract::{Id, IdempotencyHeader, IdempotencyKey, Query},
    list::List,
    models::Deleted,
};
use crate::{
    domain::{FileRecord, FileReport},
    service::{Fault, Problem, Service, fields::in_range},
    storage::{ByteStream, Key, StorageError, Stored},
};

/// OpenAI's file object.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FileObject {
    pub id: String,
    /// Always `file`.
    pub object: String,
    pub bytes: i64,
    /// Unix seconds.
    pub created_at: i64,
    pub filename: String,
    pub purpose: String,
    /// `processed`, or `error` when no job could use it.
    pub status: String,
    /// What is wrong, by line.
    pub status_details: Option<String>,
}

impl From<FileRecord> for FileObject {
    fn from(file: FileRecord) -> Self {
        Self {
            id: file.id,
            object: "file".to_owned(),
            bytes: file.bytes,
            created_at: file.created_at,
            filename: file.filename,
            purpose: file.purpose,
            status: file.status,
            status_details: file.status_details,
        }
    }
}

/// The multipart form of an upload, fields in any order.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the form in the document; the handler streams it")]
pub struct Upload {
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// `fine-tune`, `batch`, `user_data` or `evals`.
    purpose: String,
}

pub(super) fn broken(error: MultipartError) -> Problem {
    Problem::new(Fault::Invalid, "invalid_multipart", error.body_text())
}

/// Uploads a file. Training files are checked at once; `GET /v1/files/{id}/report` says more.
#[utoipa::path(post, path = "/v1/files", operation_id = "createFile", tag = "files",
    params(IdempotencyHeader), request_body(content = Upload, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "The file is durable", body = FileObject),
        (status = 400, description = "The form is wrong; `param` says where", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 409, description = "A request with this idempotency key is under way", body = ErrorEnvelope),
        (status = 413, description = "The file is above the server's limit", body = ErrorEnvelope),
        (status = 415, description = "Not a multipart form", body = ErrorEnvelope),
        (status = 422, description = "The idempotency key was used for another request", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Training(caller): Training,
    IdempotencyKey(key): IdempotencyKey,
    request: Request,
) -> Result<Json<FileObject>, ApiError> {
    let form = Multipart::from_request(request, &state).await;
    let form = form.map_err(|e| Problem::new(Fault::UnsupportedMedia, "unsupported_media_type", e.body_text()))?;
    let mut parts = Parts::default();
    let filled = parts.fill(&state.service, form).await;
    let kept = match (filled, parts) {
        (Ok(()), Parts { content: Some(content), name, purpose: Some(purpose) }) => {
            let id = content.0.clone();
            state.service.keep(&caller, key, content, &name, &purpose).await.map_err(|problem| (problem, Some(id)))
        }
        (Ok(()), Parts { content, purpose, .. }) => {
            let name = if purpose.is_none() { "purpose" } else { "file" };
            let problem = Problem::invalid(name, "missing_required_parameter", format!("the form has no {name}"));
            Err((problem, content.map(|c| c.0)))
        }
        (Err(problem), parts) => Err((problem, parts.content.map(|c| c.0))),
    };
    match kept {
        Ok(file) => Ok(Json(file.into())),
        Err((problem, orphan)) => {
            if let Some(id) = orphan {
                state.service.discard(&id).await;
            }
            Err(problem.into())
        }
    }
}

/// What a form has brought.
#[derive(Default)]
struct Parts {
    content: Option<(String, Stored)>,
    name: String,
    purpose: Option<String>,
}

impl Parts {
    async fn fill(&mut self, service: &Service, mut form: Multipart) -> Result<(), Problem> {
        while let Some(mut field) = form.next_field().await.map_err(broken)? {
            match field.name().unwrap_or_default() {
                "file" if self.content.is_some() => {
                    return Err(Problem::invalid("file", "given_twice", "the form has two files"));
                }
                "file" => {
                    self.name = field.file_name().unwrap_or_default().to_owned();
                    self.content = Some(streamed(&mut field, |body| service.receive(body)).await?);
                }
                "purpose" => {
                    let text = field.text().await.map_err(broken)?;
                    self.purpose = Some(text.chars().take(64).collect());
                }
                other => {
                    let param: String = other.chars().take(64).collect();
                    let message = format!("unknown field {param}");
                    return Err(Problem::invalid(param, "unknown_parameter", message));
                }
            }
        }
        Ok(())
    }
}

/// Streams a field to whoever stores it, a few chunks in memory.
pub(super) async fn streamed<T, F: Future<Output = Result<T, Problem>>>(
    field: &mut Field<'_>,
    store: impl FnOnce(ByteStream) -> F,
) -> Result<T, Problem> {
    let (sender, receiver) = mpsc::channel::<Result<Bytes, StorageError>>(4);
    let feed = async move {
        loop {
            let chunk = match field.chunk().await {
                Ok(Some(chunk)) => Ok(chunk),
                Ok(None) => return,
                Err(error) => Err(StorageError::Source(error.body_text())),
            };
            let is_last = chunk.is_err();
            if sender.send(chunk).await.is_err() || is_last {
                return;
            }
        }
    };
    let (stored, ()) = tokio::join!(store(ReceiverStream::new(receiver).boxed()), feed);
    stored
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct FilesQuery {
    /// Only files for this purpose.
    pub purpose: Option<String>,
    /// The id that the page begins behind.
    pub after: Option<String>,
    /// Entries of a page, 1 to 10000. Default 10000.
    #[param(minimum = 1, maximum = 10000)]
    pub limit: Option<i64>,
    /// `asc` or `desc` (default) by time.
    pub order: Option<String>,
}

/// The project's files.
#[utoipa::path(get, path = "/v1/files", operation_id = "listFiles", tag = "files", params(FilesQuery),
    responses(
        (status = 200, description = "A page of files", body = List<FileObject>),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "`after` is no file", body = ErrorEnvelope),
    ))]
pub async fn list(
    State(state): State<AppState>,
    Reading(project): Reading,
    Query(query): Query<FilesQuery>,
) -> Result<Json<List<FileObject>>, ApiError> {
    let limit = in_range("limit", query.limit.unwrap_or(10_000), 1, 10_000)? as usize;
    let ascending = match query.order.as_deref() {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(_) => return Err(Problem::invalid("order", "out_of_range", "order is neither asc nor desc").into()),
    };
    let (purpose, after) = (query.purpose.as_deref(), query.after.as_deref());
    let page = state.service.db.files(&project, purpose, after, ascending, limit).await?;
    let data = page.data.into_iter().map(FileObject::from).collect();
    Ok(Json(List::new(data, page.has_more, |file| &file.id)))
}

/// One file.
#[utoipa::path(get, path = "/v1/files/{file_id}", operation_id = "retrieveFile", tag = "files",
    params(("file_id" = String, Path, description = "`file-…`")),
    responses(
        (status = 200, description = "The file", body = FileObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such file", body = ErrorEnvelope),
    ))]
pub async fn retrieve(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
) -> Result<Json<FileObject>, ApiError> {
    Ok(Json(state.service.file(&project, &id).await?.into()))
}

/// Deletes a file that no unfinished job reads.
#[utoipa::path(delete, path = "/v1/files/{file_id}", operation_id = "deleteFile", tag = "files",
    params(("file_id" = String, Path, description = "`file-…`")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such file", body = ErrorEnvelope),
        (status = 409, description = "A job reads it", body = ErrorEnvelope),
    ))]
pub async fn delete(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(id): Id,
) -> Result<Json<Deleted>, ApiError> {
    state.service.delete_file(&caller, &id).await?;
    Ok(Json(Deleted { id, object: "file".to_owned(), deleted: true }))
}

/// A file's bytes.
#[utoipa::path(get, path = "/v1/files/{file_id}/content", operation_id = "downloadFile", tag = "files",
    params(("file_id" = String, Path, description = "`file-…`")),
    responses(
        (status = 200, description = "The bytes as uploaded", content_type = "application/octet-stream",
            body = String),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such file", body = ErrorEnvelope),
    ))]
pub async fn content(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
) -> Result<Response, ApiError> {
    let file = state.service.file(&project, &id).await?;
    let (bytes, stream) = state.service.store.get_stream(&Key::File { id: file.id }).await?;
    let headers = [(CONTENT_TYPE, "application/octet-stream".to_owned()), (CONTENT_LENGTH, bytes.to_string())];
    Ok((headers, Body::from_stream(stream)).into_response())
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ReportQuery {
    /// The base whose template and tokenizer count. Default: the server's first.
    pub model: Option<String>,
    /// Rows of more tokens are too long. Default: 1024, or the base's context if that is shorter.
    #[param(minimum = 2)]
    pub max_seq_len: Option<u64>,
}

/// What a job would make of a dataset: formats, errors by line, exact token counts, first rendered rows.
#[utoipa::path(get, path = "/v1/files/{file_id}/report", operation_id = "reportFile", tag = "files",
    params(("file_id" = String, Path, description = "`file-…`"), ReportQuery),
    responses(
        (status = 200, description = "The report", body = FileReport),
        (status = 400, description = "The file is no dataset, or the query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such file or model", body = ErrorEnvelope),
    ))]
pub async fn report(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
    Query(query): Query<ReportQuery>,
) -> Result<Json<FileReport>, ApiError> {
    let service = &state.service;
    let file = service.file(&project, &id).await?;
    let first = service.bases.iter().next().map(|resident| resident.base.info.id.clone()).unwrap_or_default();
    let model = service.model(&project, query.model.as_deref().unwrap_or(&first)).await?;
    let context = model.resident.base.info.context as u64;
    let max = in_range("max_seq_len", query.max_seq_len.unwrap_or(context.min(1024)), 2, context)?;
    Ok(Json(service.report(&file, &model.resident, max).await?))
}
