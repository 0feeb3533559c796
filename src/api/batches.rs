//! `/v1/batches`: many requests as one file, answered when nothing else waits.

use async_trait::async_trait;
use axum::{Json, body::to_bytes, extract::State, response::IntoResponse};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    AppState,
    auth::{Inferring, Listing},
    chat, completions, embeddings,
    error::{ApiError, ErrorEnvelope},
    extract::{Id, IdempotencyHeader, IdempotencyKey, JsonObject},
    list::{List, Paging},
};
use crate::{
    domain::{BatchError, BatchRecord, BatchStatus, Endpoint, id},
    jobs::batch::{Answered, Answers},
    service::Problem,
};

#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document")]
pub struct CreateBatch {
    /// A file of purpose `batch`: a line a request, `{"custom_id", "method": "POST", "url", "body"}`, at most 50,000.
    input_file_id: String,
    /// `/v1/chat/completions`, `/v1/completions` or `/v1/embeddings`: the `url` of every line.
    endpoint: String,
    /// `24h`, or beyond OpenAI a shorter time such as `90m` or `30s`.
    completion_window: String,
    /// At most 16 pairs of text.
    #[schema(value_type = Option<std::collections::HashMap<String, String>>)]
    metadata: Option<Value>,
}

#[derive(Serialize, ToSchema)]
pub struct BatchErrors {
    /// Always `list`.
    pub object: String,
    pub data: Vec<BatchError>,
}

#[derive(Serialize, ToSchema)]
pub struct RequestCounts {
    pub total: i64,
    pub completed: i64,
    pub failed: i64,
}

#[derive(Serialize, ToSchema)]
pub struct BatchUsage {
    pub input_tokens: i64,
    pub input_tokens_details: CachedTokens,
    pub output_tokens: i64,
    pub output_tokens_details: ReasoningTokens,
    pub total_tokens: i64,
}

#[derive(Serialize, ToSchema)]
pub struct CachedTokens {
    pub cached_tokens: i64,
}

#[derive(Serialize, ToSchema)]
pub struct ReasoningTokens {
    pub reasoning_tokens: i64,
}

/// OpenAI's batch object. Times are unix seconds.
#[derive(Serialize, ToSchema)]
pub struct BatchObject {
    /// `batch_…`
    pub id: String,
    /// Always `batch`.
    pub object: String,
    pub endpoint: String,
    /// What all of its requests name; null where they differ.
    pub model: Option<String>,
    /// What is wrong with the file, by line.
    pub errors: Option<BatchErrors>,
    pub input_file_id: String,
    pub completion_window: String,
    pub status: BatchStatus,
    /// The answers, a line a request, in the order of the requests.
    pub output_file_id: Option<String>,
    /// Requests that were refused or not reached, in the same shape.
    pub error_file_id: Option<String>,
    pub created_at: i64,
    pub in_progress_at: Option<i64>,
    pub expires_at: i64,
    pub finalizing_at: Option<i64>,
    pub completed_at: Option<i64>,
    pub failed_at: Option<i64>,
    pub expired_at: Option<i64>,
    pub cancelling_at: Option<i64>,
    pub cancelled_at: Option<i64>,
    pub request_counts: RequestCounts,
    pub usage: BatchUsage,
    #[schema(value_type = Option<std::collections::HashMap<String, String>>)]
    pub metadata: Option<Value>,
}

impl From<BatchRecord> for BatchObject {
    fn from(batch: BatchRecord) -> Self {
        let errors = BatchErrors { object: "list".to_owned(), data: batch.errors };
        Self {
            id: batch.id,
            object: "batch".to_owned(),
            endpoint: batch.endpoint.path().to_owned(),
            model: batch.model,
            errors: (!errors.data.is_empty()).then_some(errors),
            input_file_id: batch.input_file,
            completion_window: batch.completion_window,
            status: batch.status,
            output_file_id: batch.output_file,
            error_file_id: batch.error_file,
            created_at: batch.created_at,
            in_progress_at: batch.in_progress_at,
            expires_at: batch.expires_at,
            finalizing_at: batch.finalizing_at,
            completed_at: batch.completed_at,
            failed_at: batch.failed_at,
            expired_at: batch.expired_at,
            cancelling_at: batch.cancelling_at,
            cancelled_at: batch.cancelled_at,
            request_counts: RequestCounts { total: batch.total, completed: batch.completed, failed: batch.failed },
            usage: BatchUsage {
                input_tokens: batch.input_tokens,
                input_tokens_details: CachedTokens { cached_tokens: 0 },
                output_tokens: batch.output_tokens,
                output_tokens_details: ReasoningTokens { reasoning_tokens: 0 },
                total_tokens: batch.input_tokens + batch.output_tokens,
            },
            metadata: batch.metadata,
        }
    }
}

/// Makes a batch of a file. The file is read at once, and what is wrong in it fails the batch, by line.
#[utoipa::path(post, path = "/v1/batches", operation_id = "createBatch", tag = "batches",
    params(IdempotencyHeader), request_body = CreateBatch,
    responses(
        (status = 200, description = "The batch is durable", body = BatchObject),
        (status = 400, description = "A field is wrong; `param` says which", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such file", body = ErrorEnvelope),
        (status = 409, description = "A request with this idempotency key is under way", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
        (status = 422, description = "The idempotency key was used for another request", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Inferring(caller): Inferring,
    IdempotencyKey(key): IdempotencyKey,
    JsonObject(body): JsonObject,
) -> Result<Json<BatchObject>, ApiError> {
    Ok(Json(state.service.create_batch(&caller, key, body).await?.into()))
}

/// The project's batches, newest first.
#[utoipa::path(get, path = "/v1/batches", operation_id = "listBatches", tag = "batches", params(Paging),
    responses(
        (status = 200, description = "A page of batches", body = List<BatchObject>),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "`after` is no batch", body = ErrorEnvelope),
    ))]
pub async fn list(
    State(state): State<AppState>,
    Listing(project): Listing,
    super::extract::Query(paging): super::extract::Query<Paging>,
) -> Result<Json<List<BatchObject>>, ApiError> {
    let page = state.service.db.batches(&project, paging.after.as_deref(), paging.limit()?).await?;
    let data = page.data.into_iter().map(BatchObject::from).collect();
    Ok(Json(List::new(data, page.has_more, |batch| &batch.id)))
}

/// One batch.
#[utoipa::path(get, path = "/v1/batches/{batch_id}", operation_id = "retrieveBatch", tag = "batches",
    params(("batch_id" = String, Path, description = "`batch_…`")),
    responses(
        (status = 200, description = "The batch", body = BatchObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such batch", body = ErrorEnvelope),
    ))]
pub async fn retrieve(
    State(state): State<AppState>,
    Listing(project): Listing,
    Id(id): Id,
) -> Result<Json<BatchObject>, ApiError> {
    Ok(Json(state.service.batch(&project, &id).await?.into()))
}

/// Ends a batch early: what was answered until then is in its files.
#[utoipa::path(post, path = "/v1/batches/{batch_id}/cancel", operation_id = "cancelBatch", tag = "batches",
    params(("batch_id" = String, Path, description = "`batch_…`")),
    responses(
        (status = 200, description = "It will be cancelled within a moment", body = BatchObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such batch", body = ErrorEnvelope),
        (status = 409, description = "It has ended, or writes its files", body = ErrorEnvelope),
    ))]
pub async fn cancel(
    State(state): State<AppState>,
    Inferring(caller): Inferring,
    Id(id): Id,
) -> Result<Json<BatchObject>, ApiError> {
    Ok(Json(state.service.cancel_batch(&caller, &id).await?.into()))
}

/// The server's own handlers, asked from inside.
pub struct Inside(pub AppState);

#[async_trait]
impl Answers for Inside {
    async fn answer(&self, project: &str, endpoint: Endpoint, body: Map<String, Value>) -> Answered {
        let Self(state) = self;
        let streams = ["stream", "store"].into_iter().find(|name| body.get(*name) == Some(&Value::Bool(true)));
        let answer = match (streams, endpoint) {
            (Some(name), _) => {
                let message = format!("{name} is not supported in a batch");
                Err(Problem::invalid(name, "unsupported_parameter", message).into())
            }
            (None, Endpoint::Chat) => chat::answer(state, project, body, true).await,
            (None, Endpoint::Completions) => completions::answer(state, project, body, true).await,
            (None, Endpoint::Embeddings) => {
                embeddings::answer(state, project, body, true).await.map(IntoResponse::into_response)
            }
        };
        let response = answer.unwrap_or_else(IntoResponse::into_response);
        let status = response.status().as_u16();
        // Made in this process: it neither breaks off nor is anything but JSON.
        let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap_or_default();
        Answered { status, request_id: id::new("req_"), body: serde_json::from_slice(&bytes).unwrap_or(Value::Null) }
    }
}
