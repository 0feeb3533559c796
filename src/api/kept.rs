//! Kept answers: `GET` and `DELETE /v1/chat/completions/{id}`.

use axum::{Json, extract::State};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::{Reading, Training},
    error::{ApiError, ErrorEnvelope},
    extract::Id,
    models::Deleted,
};

/// An answer whose request said `"store": true`.
#[derive(Serialize, ToSchema)]
pub struct KeptCompletion {
    pub id: String,
    /// Always `chat.completion`.
    pub object: String,
    /// Unix seconds.
    pub created: i64,
    pub model: String,
    pub system_fingerprint: String,
    /// The conversation that was answered.
    #[schema(value_type = Vec<std::collections::HashMap<String, Value>>)]
    pub messages: Vec<Value>,
    pub choices: Vec<KeptChoice>,
}

#[derive(Serialize, ToSchema)]
pub struct KeptChoice {
    pub index: u64,
    pub message: KeptMessage,
}

#[derive(Serialize, ToSchema)]
pub struct KeptMessage {
    /// Always `assistant`.
    pub role: String,
    pub content: String,
}

/// A kept answer.
#[utoipa::path(get, path = "/v1/chat/completions/{completion_id}", operation_id = "retrieveChatCompletion", tag = "chat",
    params(("completion_id" = String, Path, description = "`chatcmpl-…`")),
    responses(
        (status = 200, description = "The answer and its conversation", body = KeptCompletion),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such kept completion", body = ErrorEnvelope),
    ))]
pub async fn retrieve(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
) -> Result<Json<KeptCompletion>, ApiError> {
    let kept = state.service.completion(&project, &id, "id").await?;
    let choices = (0..)
        .zip(kept.choices)
        .map(|(index, content)| KeptChoice { index, message: KeptMessage { role: "assistant".to_owned(), content } });
    Ok(Json(KeptCompletion {
        id: kept.id,
        object: "chat.completion".to_owned(),
        created: kept.created_at,
        model: kept.model,
        system_fingerprint: kept.fingerprint,
        messages: kept.messages,
        choices: choices.collect(),
    }))
}

/// Forgets a kept answer, and what was said of it.
#[utoipa::path(delete, path = "/v1/chat/completions/{completion_id}", operation_id = "deleteChatCompletion", tag = "chat",
    params(("completion_id" = String, Path, description = "`chatcmpl-…`")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such kept completion", body = ErrorEnvelope),
    ))]
pub async fn delete(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(id): Id,
) -> Result<Json<Deleted>, ApiError> {
    state.service.delete_completion(&caller, &id).await?;
    Ok(Json(Deleted { id, object: "chat.completion.deleted".to_owned(), deleted: true }))
}
