//! `/v1/aliases`: names of the user's own for adapters, moved by compare-and-swap.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::{Listing, Training},
    error::{ApiError, ErrorEnvelope},
    extract::{Id, JsonObject, Query},
    list::{List, Paging},
    models::Deleted,
};
use crate::domain::AliasRecord;

/// An alias: as good as a model's name in any request that generates.
#[derive(Serialize, ToSchema)]
pub struct AliasObject {
    /// What requests put into `model`.
    pub id: String,
    /// Always `alias`.
    pub object: String,
    /// The adapter behind it.
    pub model: String,
    pub generation: String,
    /// Unix seconds.
    pub updated_at: i64,
}

impl From<AliasRecord> for AliasObject {
    fn from(alias: AliasRecord) -> Self {
        let AliasRecord { name, model, generation, updated_at, .. } = alias;
        Self { id: name, object: "alias".to_owned(), model, generation, updated_at }
    }
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document")]
pub struct MoveAlias {
    /// The adapter: its id, or its model's name.
    model: String,
    /// The alias moves only if it points at this generation; null: only if there is no such alias. Left out, it moves
    /// from wherever it is.
    expected_generation: Option<String>,
}

/// Points an alias at an adapter. Requests under way end with the adapter that they began with.
#[utoipa::path(put, path = "/v1/aliases/{alias}", operation_id = "moveAlias", tag = "adapters",
    params(("alias" = String, Path, description = "1 to 64 letters, digits, dots, dashes and underscores")),
    request_body = MoveAlias,
    responses(
        (status = 200, description = "It points at the adapter", body = AliasObject),
        (status = 400, description = "A field is wrong; `param` says which", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such adapter", body = ErrorEnvelope),
        (status = 409, description = "It does not stand where it was expected", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
    ))]
pub async fn put(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(name): Id,
    JsonObject(body): JsonObject,
) -> Result<Json<AliasObject>, ApiError> {
    Ok(Json(state.service.move_alias(&caller, &name, body).await?.into()))
}

/// The project's aliases, by name.
#[utoipa::path(get, path = "/v1/aliases", operation_id = "listAliases", tag = "adapters", params(Paging),
    responses(
        (status = 200, description = "A page of aliases", body = List<AliasObject>),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "`after` is no alias", body = ErrorEnvelope),
    ))]
pub async fn list(
    State(state): State<AppState>,
    Listing(project): Listing,
    Query(paging): Query<Paging>,
) -> Result<Json<List<AliasObject>>, ApiError> {
    if let Some(after) = &paging.after {
        state.service.alias(&project, after).await?;
    }
    let page = state.service.db.aliases(&project, paging.after.as_deref().unwrap_or(""), paging.limit()?).await?;
    let data = page.data.into_iter().map(AliasObject::from).collect();
    Ok(Json(List::new(data, page.has_more, |alias| &alias.id)))
}

/// One alias.
#[utoipa::path(get, path = "/v1/aliases/{alias}", operation_id = "retrieveAlias", tag = "adapters",
    params(("alias" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The alias", body = AliasObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such alias", body = ErrorEnvelope),
    ))]
pub async fn retrieve(
    State(state): State<AppState>,
    Listing(project): Listing,
    Id(name): Id,
) -> Result<Json<AliasObject>, ApiError> {
    Ok(Json(state.service.alias(&project, &name).await?.into()))
}

/// Removes an alias; the adapter stays.
#[utoipa::path(delete, path = "/v1/aliases/{alias}", operation_id = "deleteAlias", tag = "adapters",
    params(("alias" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such alias", body = ErrorEnvelope),
    ))]
pub async fn delete(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(name): Id,
) -> Result<Json<Deleted>, ApiError> {
    state.service.delete_alias(&caller, &name).await?;
    Ok(Json(Deleted { id: name, object: "alias".to_owned(), deleted: true }))
}
