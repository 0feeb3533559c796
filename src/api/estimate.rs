//! `/v1/fine_tuning/estimate`.

use axum::{Json, extract::State};

use super::{
    AppState,
    auth::Training,
    error::{ApiError, ErrorEnvelope},
    extract::JsonObject,
    jobs::CreateJob,
};
use crate::service::estimate::Estimate;

/// What a job would need, and which methods suit its data: rows, tokens, trained values, memory, time.
#[utoipa::path(post, path = "/v1/fine_tuning/estimate", operation_id = "estimateFineTuningJob", tag = "fine-tuning",
    request_body = CreateJob,
    responses(
        (status = 200, description = "Nothing is queued. Counts are exact; memory and time come from short passes",
            body = Estimate),
        (status = 400, description = "A field or a line of the data is wrong; `param` says which", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such model or file", body = ErrorEnvelope),
        (status = 409, description = "The adapter to continue cannot be read", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Training(caller): Training,
    JsonObject(body): JsonObject,
) -> Result<Json<Estimate>, ApiError> {
    Ok(Json(state.service.estimate(&caller, body).await?))
}
