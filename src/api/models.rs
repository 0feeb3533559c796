//! `/v1/models`: bases and tuned models.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::{Listing, Training},
    error::{ApiError, ErrorEnvelope},
    extract::Id,
};
use crate::service::catalogue::ModelObject;

#[derive(Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    pub object: String,
    pub data: Vec<ModelObject>,
}

#[derive(Serialize, ToSchema)]
pub struct Deleted {
    pub id: String,
    pub object: String,
    pub deleted: bool,
}

/// Every base and tuned model that this key can use.
#[utoipa::path(get, path = "/v1/models", operation_id = "listModels", tag = "models",
    responses(
        (status = 200, description = "Bases first, then tuned models and checkpoints, newest first", body = ModelList),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
    ))]
pub async fn list(State(state): State<AppState>, Listing(project): Listing) -> Result<Json<ModelList>, ApiError> {
    let data = state.service.model_objects(&project).await?;
    Ok(Json(ModelList { object: "list".to_owned(), data }))
}

/// One model.
#[utoipa::path(get, path = "/v1/models/{model}", operation_id = "retrieveModel", tag = "models",
    params(("model" = String, Path, description = "A base's id or a tuned model's name")),
    responses(
        (status = 200, description = "The model", body = ModelObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such model", body = ErrorEnvelope),
    ))]
pub async fn retrieve(
    State(state): State<AppState>,
    Listing(project): Listing,
    Id(model): Id,
) -> Result<Json<ModelObject>, ApiError> {
    Ok(Json(state.service.model_object(&project, &model).await?))
}

/// Deletes a tuned model: its name at once, its files when no other name has them.
#[utoipa::path(delete, path = "/v1/models/{model}", operation_id = "deleteModel", tag = "models",
    params(("model" = String, Path, description = "A tuned model's name")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "A base, or the key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such model", body = ErrorEnvelope),
    ))]
pub async fn delete(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(model): Id,
) -> Result<Json<Deleted>, ApiError> {
    state.service.delete_model(&caller, &model).await?;
    Ok(Json(Deleted { id: model, object: "model".to_owned(), deleted: true }))
}
