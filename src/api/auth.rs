//! Who calls: a value of these types is the proof that the key was checked.

use axum::{
    extract::FromRequestParts,
    http::{header::AUTHORIZATION, request::Parts},
};

use super::{AppState, error::ApiError};
use crate::{
    db::DbError,
    domain::{Caller, Scope},
    inference::sha256,
    service::{Fault, Problem},
};

/// May train: files, jobs, adapters.
pub struct Training(pub Caller);
/// May generate text.
pub struct Inference(pub String);
/// May say what it thinks of generated text: that leaves a trace.
pub struct Inferring(pub Caller);
/// May look at files, jobs and adapters.
pub struct Reading(pub String);
/// May look at the models: whoever uses them must find them.
pub struct Listing(pub String);

async fn caller(parts: &Parts, state: &AppState, needed: &[Scope]) -> Result<Caller, ApiError> {
    let unauthorized = |message: &str| Problem::new(Fault::Unauthorized, "invalid_api_key", message);
    let header = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = header.and_then(|value| value.strip_prefix("Bearer ").or(value.strip_prefix("bearer ")));
    let Some(key) = key.map(str::trim).filter(|key| !key.is_empty()) else {
        return Err(unauthorized("this route needs an API key: Authorization: Bearer KEY").into());
    };
    let key = state.service.db.key(&sha256(key.as_bytes())).await.map_err(|error| match error {
        DbError::NotFound => unauthorized("the API key is wrong or was revoked"),
        error => error.into(),
    })?;
    if key.scopes.iter().any(|scope| *scope == Scope::All || needed.contains(scope)) {
        return Ok(Caller { project: key.project, key: key.id });
    }
    let message = format!("the key {} has no scope for this: it needs one of {needed:?} or All", key.id);
    Err(Problem::new(Fault::Forbidden, "insufficient_scope", message).into())
}

/// Whoever changes nothing leaves no trace in the audit log.
fn project(caller: Caller) -> String {
    caller.project
}

macro_rules! extractor {
    ($name:ident, $what:expr, $($scope:ident),+) => {
        impl FromRequestParts<AppState> for $name {
            type Rejection = ApiError;

            async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
                Ok(Self($what(caller(parts, state, &[$(Scope::$scope),+]).await?)))
            }
        }
    };
}

extractor!(Training, std::convert::identity, Training);
extractor!(Inference, project, Inference);
extractor!(Inferring, std::convert::identity, Inference);
extractor!(Reading, project, Read, Training);
extractor!(Listing, project, Read, Training, Inference);
