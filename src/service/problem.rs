//! Why a request cannot be served, in words for its sender.

use crate::{
    db::DbError,
    domain::SpecError,
    inference::{ArtifactError, EngineError},
    methods::MethodError,
    storage::StorageError,
    text::TextError,
};

/// What kind of answer a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Invalid,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    Conflict,
    TooLarge,
    UnsupportedMedia,
    Unprocessable,
    Busy,
    Unavailable,
    Internal,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    pub fault: Fault,
    pub message: String,
    /// The field of the request.
    pub param: Option<String>,
    pub code: Option<String>,
}

impl Problem {
    /// Another request with the same idempotency key is under way.
    pub(super) const KEY_IN_USE: &str = "idempotency_key_in_use";

    pub fn new(fault: Fault, code: &str, message: impl Into<String>) -> Self {
        Self { fault, message: message.into(), param: None, code: Some(code.to_owned()) }
    }

    /// A field of the request is wrong.
    pub fn invalid(param: impl Into<String>, code: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(Fault::Invalid, code, message) }
    }

    pub fn not_found(what: &str, id: &str) -> Self {
        Self {
            param: Some("id".to_owned()),
            ..Self::new(Fault::NotFound, "not_found", format!("no such {what}: {id}"))
        }
    }

    pub fn model_not_found(model: &str) -> Self {
        let message = format!("the model {model} does not exist or you do not have access to it");
        Self { param: Some("model".to_owned()), ..Self::new(Fault::NotFound, "model_not_found", message) }
    }

    /// The sender can do nothing about it; what happened goes to the log.
    pub fn internal(error: impl std::fmt::Display) -> Self {
        tracing::error!("internal error: {error}");
        Self::new(Fault::Internal, "internal_error", "the server had an error; its log has the details")
    }

    pub fn at(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }
}

impl From<DbError> for Problem {
    fn from(error: DbError) -> Self {
        match error {
            DbError::NotFound => Self::new(Fault::NotFound, "not_found", "not found"),
            DbError::Conflict(message) => Self::new(Fault::Conflict, "invalid_state", message),
            DbError::Answered => Self::new(Fault::Conflict, Self::KEY_IN_USE, error.to_string()).at("Idempotency-Key"),
            DbError::Sql(error) => {
                tracing::error!("database: {error}");
                Self::new(Fault::Unavailable, "database_unavailable", "the database does not answer: try again")
            }
            other => Self::internal(other),
        }
    }
}

impl From<StorageError> for Problem {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::NotFound(_) => Self::new(Fault::NotFound, "not_found", "the content is not in the store"),
            StorageError::TooLarge { limit } => {
                Self::new(Fault::TooLarge, "file_too_large", format!("the upload is above the limit of {limit} bytes"))
            }
            StorageError::Source(why) => Self::new(Fault::Invalid, "upload_broken", why),
            StorageError::Unavailable(why) => {
                tracing::error!("store: {why}");
                Self::new(Fault::Unavailable, "store_unavailable", "the blob store does not answer: try again")
            }
            other => Self::internal(other),
        }
    }
}

impl From<SpecError> for Problem {
    fn from(error: SpecError) -> Self {
        Self::invalid(error.param, error.code, error.message)
    }
}

impl From<EngineError> for Problem {
    fn from(error: EngineError) -> Self {
        let (fault, code) = match &error {
            EngineError::Full { .. } => (Fault::Busy, "queue_full"),
            EngineError::Adapter(_) => (Fault::Conflict, "adapter_unusable"),
            EngineError::Task(_) => return Self::invalid("model", "wrong_task", error.to_string()),
            EngineError::TooLarge { .. } => (Fault::Conflict, "adapter_too_large"),
            EngineError::Memory { .. } => (Fault::Invalid, "context_length_exceeded"),
            EngineError::Unavailable(_) => (Fault::Unavailable, "store_unavailable"),
            EngineError::Timeout => (Fault::Unavailable, "timeout"),
            EngineError::Late(_) => (Fault::Unavailable, "adapter_late"),
            EngineError::Scores => (Fault::Internal, "scores_not_finite"),
            EngineError::Grammar(_) => (Fault::Unprocessable, "format_impossible"),
            EngineError::Stopping => (Fault::Unavailable, "stopping"),
            EngineError::Internal(_) => return Self::internal(error),
        };
        Self::new(fault, code, error.to_string())
    }
}

impl From<ArtifactError> for Problem {
    fn from(error: ArtifactError) -> Self {
        match error {
            ArtifactError::Storage(error) => error.into(),
            ArtifactError::Damaged(_) => Self::new(Fault::Conflict, "adapter_unusable", error.to_string()),
        }
    }
}

impl From<MethodError> for Problem {
    fn from(error: MethodError) -> Self {
        Self::invalid("file", "invalid_adapter", error.to_string())
    }
}

impl From<TextError> for Problem {
    fn from(error: TextError) -> Self {
        match error {
            TextError::Template(why) => Self::invalid("messages", "invalid_messages", why),
            TextError::Grammar(why) => Self::invalid("response_format", "invalid_json_schema", why),
            TextError::NoTemplate(_) => Self::invalid("model", "no_chat_template", error.to_string()),
            other => Self::internal(other),
        }
    }
}
