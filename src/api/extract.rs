//! Bodies and queries whose faults come back in the envelope.

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path as AxumPath, Query as AxumQuery, Request},
    http::{header::CONTENT_TYPE, request::Parts},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::service::{Fault, Problem};

/// Bytes of a JSON body.
pub const MAX_JSON: usize = 16 << 20;

/// A JSON object, before its fields are read.
pub struct JsonObject(pub Map<String, Value>);

impl<S: Send + Sync> FromRequest<S> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let kind = request.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        if !kind.to_ascii_lowercase().starts_with("application/json") {
            let message = format!("the body is {kind:?}, not application/json");
            return Err(Problem::new(Fault::UnsupportedMedia, "unsupported_media_type", message).into());
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|_| {
            let message = format!("the body broke off or is above the limit of {MAX_JSON} bytes");
            Problem::new(Fault::TooLarge, "body_too_large", message)
        })?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(Problem::new(Fault::Invalid, "invalid_json", "the body is not a JSON object").into()),
            Err(error) => {
                Err(Problem::new(Fault::Invalid, "invalid_json", format!("the body is not JSON: {error}")).into())
            }
        }
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
