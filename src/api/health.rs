//! Whether the process lives and can work.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{AppState, error::ApiError, error::ErrorEnvelope};
use crate::service::{Fault, Problem};

#[derive(Serialize, ToSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: String,
}

fn ok() -> Json<Health> {
    Json(Health { status: "ok".to_owned() })
}

/// Whether the process runs. Needs no key.
#[utoipa::path(get, path = "/livez", operation_id = "live", tag = "health", security(()),
    responses((status = 200, description = "The process runs", body = Health)))]
pub async fn live() -> Json<Health> {
    ok()
}

/// Whether requests are welcome: the database answers and the server does not stop. Needs no key.
#[utoipa::path(get, path = "/readyz", operation_id = "ready", tag = "health", security(()),
    responses(
        (status = 200, description = "Requests are welcome", body = Health),
        (status = 503, description = "Not now", body = ErrorEnvelope),
    ))]
pub async fn ready(State(state): State<AppState>) -> Result<Json<Health>, ApiError> {
    if !state.is_ready() {
        return Err(Problem::new(Fault::Unavailable, "stopping", "the server is stopping").into());
    }
    state.service.db.ping().await?;
    Ok(ok())
}
