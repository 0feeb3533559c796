//! `/v1/uploads`: large files in parts.

use axum::{
    Json,
    extract::{FromRequest, Multipart, Request, State},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::Training,
    error::{ApiError, ErrorEnvelope},
    extract::{Id, JsonObject},
    files::{FileObject, broken, streamed},
};
use crate::{
    domain::upload::{PartRecord, UploadRecord, UploadStatus},
    service::{Fault, Problem},
};

/// A file to come.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document")]
pub struct CreateUpload {
    filename: String,
    /// `fine-tune`, `batch`, `user_data` or `evals`.
    purpose: String,
    /// What the parts come to, at most the server's limit.
    #[schema(minimum = 1)]
    bytes: i64,
    /// Has to be there; changes nothing.
    mime_type: String,
}

/// OpenAI's upload object.
#[derive(Serialize, ToSchema)]
pub struct UploadObject {
    /// `upload_…`
    pub id: String,
    /// Always `upload`.
    pub object: String,
    pub bytes: i64,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds; an hour after the start.
    pub expires_at: i64,
    pub filename: String,
    pub purpose: String,
    pub status: UploadStatus,
    /// What it became.
    pub file: Option<FileObject>,
}

impl UploadObject {
    fn new(record: UploadRecord, file: Option<FileObject>) -> Self {
        Self {
            id: record.id,
            object: "upload".to_owned(),
            bytes: record.bytes,
            created_at: record.created_at,
            expires_at: record.expires_at,
            filename: record.filename,
            purpose: record.purpose,
            status: record.status,
            file,
        }
    }
}

#[derive(Serialize, ToSchema)]
pub struct PartObject {
    /// `part_…`
    pub id: String,
    /// Always `upload.part`.
    pub object: String,
    /// Unix seconds.
    pub created_at: i64,
    pub upload_id: String,
}

impl From<PartRecord> for PartObject {
    fn from(part: PartRecord) -> Self {
        let object = "upload.part".to_owned();
        Self { id: part.id, object, created_at: part.created_at, upload_id: part.upload_id }
    }
}

/// Begins an upload; its parts may come for an hour.
#[utoipa::path(post, path = "/v1/uploads", operation_id = "createUpload", tag = "files", request_body = CreateUpload,
    responses(
        (status = 200, description = "Parts may come", body = UploadObject),
        (status = 400, description = "A field is wrong; `param` says which", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Training(caller): Training,
    JsonObject(body): JsonObject,
) -> Result<Json<UploadObject>, ApiError> {
    Ok(Json(UploadObject::new(state.service.create_upload(&caller, body).await?, None)))
}

/// The multipart form of a part.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the form in the document; the handler streams it")]
pub struct AddPart {
    /// At most 64 MiB.
    #[schema(value_type = String, format = Binary)]
    data: Vec<u8>,
}

/// Adds a part. Parts may come side by side; their order is told at the end.
#[utoipa::path(post, path = "/v1/uploads/{upload_id}/parts", operation_id = "addUploadPart", tag = "files",
    params(("upload_id" = String, Path, description = "`upload_…`")),
    request_body(content = AddPart, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "The part is durable", body = PartObject),
        (status = 400, description = "The form is wrong, or the upload has ended", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such upload", body = ErrorEnvelope),
        (status = 413, description = "The part is above 64 MiB", body = ErrorEnvelope),
        (status = 415, description = "Not a multipart form", body = ErrorEnvelope),
    ))]
pub async fn add_part(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(upload): Id,
    request: Request,
) -> Result<Json<PartObject>, ApiError> {
    let form = Multipart::from_request(request, &state).await;
    let mut form = form.map_err(|e| Problem::new(Fault::UnsupportedMedia, "unsupported_media_type", e.body_text()))?;
    let Some(mut field) = form.next_field().await.map_err(broken)? else {
        return Err(Problem::invalid("data", "missing_required_parameter", "the form has no data").into());
    };
    if field.name() != Some("data") {
        let param: String = field.name().unwrap_or_default().chars().take(64).collect();
        let message = format!("unknown field {param}; known is data");
        return Err(Problem::invalid(param, "unknown_parameter", message).into());
    }
    let part = streamed(&mut field, |body| state.service.add_part(&caller, &upload, body)).await?;
    Ok(Json(part.into()))
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document")]
pub struct CompleteUpload {
    /// The parts in the file's order.
    part_ids: Vec<String>,
    /// Of the whole content, in hex: checked when it is there.
    md5: Option<String>,
}

/// Makes a file of the parts.
#[utoipa::path(post, path = "/v1/uploads/{upload_id}/complete", operation_id = "completeUpload", tag = "files",
    params(("upload_id" = String, Path, description = "`upload_…`")), request_body = CompleteUpload,
    responses(
        (status = 200, description = "The file is durable", body = UploadObject),
        (status = 400, description = "A part is missing, sizes differ, or the upload has ended", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such upload", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
    ))]
pub async fn complete(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(upload): Id,
    JsonObject(body): JsonObject,
) -> Result<Json<UploadObject>, ApiError> {
    let (record, file) = state.service.complete_upload(&caller, &upload, body).await?;
    Ok(Json(UploadObject::new(record, Some(file.into()))))
}

/// Ends an upload and removes its parts.
#[utoipa::path(post, path = "/v1/uploads/{upload_id}/cancel", operation_id = "cancelUpload", tag = "files",
    params(("upload_id" = String, Path, description = "`upload_…`")),
    responses(
        (status = 200, description = "It is cancelled", body = UploadObject),
        (status = 400, description = "The upload has ended already", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such upload", body = ErrorEnvelope),
    ))]
pub async fn cancel(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(upload): Id,
) -> Result<Json<UploadObject>, ApiError> {
    Ok(Json(UploadObject::new(state.service.cancel_upload(&caller, &upload).await?, None)))
}
