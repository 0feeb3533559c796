//! Bodies and queries whose faults come back in the envelope.

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path as AxumPath, Query as AxumQuery, Request},
    http::{header::CONTENT_TYPE, request::Parts},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use utoipa::IntoParams;

use super::error::ApiError;
use crate::service::{Fault, Problem};

/// Bytes of a JSON body.
pub const MAX_JSON: usize = 16 << 20;

/// A JSON object, before its fields are read.
pub struct JsonObject(pub Map<String, Value>);

impl<S: Send + Sync> FromRequest<S> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        check_kind(&kind(&request))?;
        Ok(Self(object(&body(request, state).await?)?))
    }
}

/// A JSON object that may be left out.
pub struct OptionalObject(pub Map<String, Value>);

impl<S: Send + Sync> FromRequest<S> for OptionalObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let kind = kind(&request);
        let bytes = body(request, state).await?;
        if bytes.is_empty() {
            return Ok(Self(Map::new()));
        }
        check_kind(&kind)?;
        Ok(Self(object(&bytes)?))
    }
}

fn kind(request: &Request) -> String {
    request.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

fn check_kind(kind: &str) -> Result<(), Problem> {
    if kind.to_ascii_lowercase().starts_with("application/json") {
        return Ok(());
    }
    let message = format!("the body is {kind:?}, not application/json");
    Err(Problem::new(Fault::UnsupportedMedia, "unsupported_media_type", message))
}

async fn body<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes, Problem> {
    Bytes::from_request(request, state).await.map_err(|_| {
        let message = format!("the body broke off or is above the limit of {MAX_JSON} bytes");
        Problem::new(Fault::TooLarge, "body_too_large", message)
    })
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, Problem> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(Problem::new(Fault::Invalid, "invalid_json", "the body is not a JSON object")),
        Err(error) => Err(Problem::new(Fault::Invalid, "invalid_json", format!("the body is not JSON: {error}"))),
    }
}

/// A query string; unknown fields are errors where the type denies them.
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = AxumQuery::from_request_parts(parts, state).await;
        let AxumQuery(query) = query.map_err(|e| Problem::new(Fault::Invalid, "invalid_query", e.body_text()))?;
        Ok(Self(query))
    }
}

/// One part of the path.
pub struct Id(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = AxumPath::<String>::from_request_parts(parts, state).await;
        let AxumPath(id) = path.map_err(|e| Problem::new(Fault::Invalid, "invalid_path", e.body_text()))?;
        if id.contains('\0') {
            return Err(Problem::new(Fault::NotFound, "not_found", "no such id").into());
        }
        Ok(Self(id))
    }
}

/// How the header stands in the document.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "describes the header in the document")]
pub struct IdempotencyHeader {
    /// 1 to 255 visible characters. For 24 hours the same key with the same request gets the same answer, and nothing
    /// is made twice.
    #[param(rename = "Idempotency-Key", min_length = 1, max_length = 255)]
    idempotency_key: Option<String>,
}

/// The header's value, if there is one.
pub struct IdempotencyKey(pub Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Some(value) = parts.headers.get("idempotency-key") else { return Ok(Self(None)) };
        let key = value.to_str().ok().filter(|key| (1..=255).contains(&key.len()));
        let message = "Idempotency-Key takes 1 to 255 visible characters";
        let key = key.ok_or_else(|| Problem::invalid("Idempotency-Key", "invalid_idempotency_key", message))?;
        Ok(Self(Some(key.to_owned())))
    }
}
