//! The one error envelope, and the only place that knows status numbers.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::service::{Fault, Problem};

/// All four keys are always there.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    pub message: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// The field of the request.
    pub param: Option<String>,
    pub code: Option<String>,
}

/// What every answer that is not a success carries.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorEnvelope {
    pub error: ErrorBody,
}

/// A problem on its way out.
pub struct ApiError(pub Problem);

impl<E: Into<Problem>> From<E> for ApiError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// Seconds after which a refused request may be tried again.
const RETRY: HeaderValue = HeaderValue::from_static("2");

fn status(fault: Fault) -> (StatusCode, &'static str) {
    match fault {
        Fault::Invalid => (StatusCode::BAD_REQUEST, "invalid_request_error"),
        Fault::Unauthorized => (StatusCode::UNAUTHORIZED, "authentication_error"),
        Fault::Forbidden => (StatusCode::FORBIDDEN, "permission_error"),
        Fault::NotFound => (StatusCode::NOT_FOUND, "invalid_request_error"),
        Fault::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error"),
        Fault::Conflict => (StatusCode::CONFLICT, "invalid_request_error"),
        Fault::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error"),
        Fault::UnsupportedMedia => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error"),
        Fault::Unprocessable => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_request_error"),
        Fault::Busy => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error"),
        Fault::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "server_error"),
        Fault::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "server_error"),
    }
}

/// The envelope alone: for errors inside a stream.
pub fn envelope(problem: Problem) -> ErrorEnvelope {
    let kind = status(problem.fault).1.to_owned();
    ErrorEnvelope { error: ErrorBody { message: problem.message, kind, param: problem.param, code: problem.code } }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, _) = status(self.0.fault);
        let retry = matches!(self.0.fault, Fault::Busy | Fault::Unavailable);
        let mut response = (status, Json(envelope(self.0))).into_response();
        if retry {
            response.headers_mut().insert(RETRY_AFTER, RETRY);
        }
        response
    }
}

/// For routes that do not exist.
pub async fn no_route(uri: axum::http::Uri) -> ApiError {
    ApiError(Problem::new(Fault::NotFound, "unknown_url", format!("no such route: {}", uri.path())))
}

/// For routes that exist under another method.
pub async fn no_method(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    let message = format!("{method} is not allowed on {}", uri.path());
    ApiError(Problem::new(Fault::MethodNotAllowed, "method_not_allowed", message))
}
