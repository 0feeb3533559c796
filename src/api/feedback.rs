//! `/v1/feedback`: what people say of kept answers, and datasets made of it.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::{Inferring, Reading, Training},
    error::{ApiError, ErrorEnvelope},
    extract::{Id, IdempotencyHeader, IdempotencyKey, JsonObject, Query},
    files::FileObject,
    list::{List, Paging},
    models::Deleted,
};
use crate::{
    domain::{Feedback, feedback::Judgement},
    service::{
        feedback::{RowFormat, Selection},
        fields::read,
    },
};

/// A judgement of one answer: exactly one of thumb, rating, preferred_over and correction.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document")]
pub struct FeedbackRequest {
    /// `chatcmpl-…` of an answer whose request said `"store": true`.
    completion_id: String,
    /// The answer's index. Default 0.
    choice: Option<u64>,
    /// `up` or `down`.
    thumb: Option<String>,
    /// 1 (bad) to 5 (good).
    #[schema(minimum = 1, maximum = 5)]
    rating: Option<i64>,
    preferred_over: Option<OtherAnswer>,
    /// What should have been said.
    correction: Option<String>,
    /// At most 4096 characters.
    comment: Option<String>,
}

/// A worse answer to the same conversation.
#[derive(Serialize, ToSchema)]
pub struct OtherAnswer {
    /// Default: the completion itself.
    completion_id: Option<String>,
    /// Default 0.
    choice: Option<u64>,
}

/// What was said of an answer.
#[derive(Serialize, ToSchema)]
pub struct FeedbackObject {
    /// `fb-…`
    pub id: String,
    /// Always `feedback`.
    pub object: String,
    /// Unix seconds.
    pub created_at: i64,
    pub completion_id: String,
    pub choice: u64,
    /// `up` or `down`.
    pub thumb: Option<String>,
    pub rating: Option<u8>,
    pub preferred_over: Option<OtherAnswer>,
    pub correction: Option<String>,
    pub comment: Option<String>,
}

impl FeedbackObject {
    fn new(said: Feedback) -> Self {
        let mut object = Self {
            id: said.id,
            object: "feedback".to_owned(),
            created_at: said.created_at,
            completion_id: said.completion_id,
            choice: said.choice as u64,
            thumb: None,
            rating: None,
            preferred_over: None,
            correction: None,
            comment: said.comment,
        };
        match said.judgement {
            Judgement::Thumb { up } => object.thumb = Some(if up { "up" } else { "down" }.to_owned()),
            Judgement::Rating { value } => object.rating = Some(value),
            Judgement::Preference { over_completion, over_choice } => {
                let (completion_id, choice) = (Some(over_completion), Some(over_choice as u64));
                object.preferred_over = Some(OtherAnswer { completion_id, choice });
            }
            Judgement::Correction { text } => object.correction = Some(text),
        }
        object
    }
}

/// Says what somebody thinks of an answer.
#[utoipa::path(post, path = "/v1/feedback", operation_id = "createFeedback", tag = "feedback",
    params(IdempotencyHeader), request_body = FeedbackRequest,
    responses(
        (status = 200, description = "It is kept", body = FeedbackObject),
        (status = 400, description = "A field is wrong; `param` says which", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such kept completion", body = ErrorEnvelope),
        (status = 409, description = "A request with this idempotency key is under way", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
        (status = 422, description = "The idempotency key was used for another request", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Inferring(caller): Inferring,
    IdempotencyKey(key): IdempotencyKey,
    JsonObject(body): JsonObject,
) -> Result<Json<FeedbackObject>, ApiError> {
    Ok(Json(FeedbackObject::new(state.service.say(&caller, key, body).await?)))
}

/// The project's feedback, newest first.
#[utoipa::path(get, path = "/v1/feedback", operation_id = "listFeedback", tag = "feedback", params(Paging),
    responses(
        (status = 200, description = "A page of feedback", body = List<FeedbackObject>),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "`after` is no feedback", body = ErrorEnvelope),
    ))]
pub async fn list(
    State(state): State<AppState>,
    Reading(project): Reading,
    Query(paging): Query<Paging>,
) -> Result<Json<List<FeedbackObject>>, ApiError> {
    let page = state.service.feedback(&project, paging.after.as_deref(), paging.limit()?).await?;
    let data = page.data.into_iter().map(FeedbackObject::new).collect();
    Ok(Json(List::new(data, page.has_more, |said| &said.id)))
}

/// Takes back what was said.
#[utoipa::path(delete, path = "/v1/feedback/{feedback_id}", operation_id = "deleteFeedback", tag = "feedback",
    params(("feedback_id" = String, Path, description = "`fb-…`")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such feedback", body = ErrorEnvelope),
    ))]
pub async fn delete(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(id): Id,
) -> Result<Json<Deleted>, ApiError> {
    state.service.delete_feedback(&caller, &id).await?;
    Ok(Json(Deleted { id, object: "feedback".to_owned(), deleted: true }))
}

/// Which feedback, and as what.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document")]
pub struct ExportRequest {
    /// `sft` (good answers), `preference` (pairs) or `kto` (answers with a label).
    format: String,
    /// Unix seconds of the feedback.
    since: Option<i64>,
    until: Option<i64>,
    /// The model that answered.
    model: Option<String>,
    /// Ratings from here on are good. Default 4.
    #[schema(minimum = 1, maximum = 5)]
    min_rating: Option<u8>,
    /// Ratings up to here are bad. Default 2.
    #[schema(minimum = 0, maximum = 4)]
    max_rating: Option<u8>,
}

#[derive(Serialize, ToSchema)]
pub struct ExportObject {
    /// Always `feedback.export`.
    pub object: String,
    pub format: String,
    pub file: FileObject,
    pub rows: u64,
    /// Feedback that gives no row of this format.
    pub unused: u64,
}

/// Makes a dataset of the feedback of a period. A job takes `feedback` in the place of `training_file` to do both.
#[utoipa::path(post, path = "/v1/feedback/export", operation_id = "exportFeedback", tag = "feedback",
    request_body = ExportRequest,
    responses(
        (status = 200, description = "The file", body = ExportObject),
        (status = 400, description = "A field is wrong, or nothing gives a row", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 413, description = "The file would be above the server's limit", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
    ))]
pub async fn export(
    State(state): State<AppState>,
    Training(caller): Training,
    JsonObject(mut body): JsonObject,
) -> Result<Json<ExportObject>, ApiError> {
    #[derive(Deserialize)]
    struct Format {
        format: String,
    }
    let format = body.shift_remove("format").unwrap_or(Value::Null);
    let format: Format = read([("format".to_owned(), format)].into_iter().collect())?;
    let format = RowFormat::named(&format.format)?;
    let selection: Selection = read(body)?;
    let made = state.service.export_feedback(&caller, &selection, format).await?;
    Ok(Json(ExportObject {
        object: "feedback.export".to_owned(),
        format: format.name().to_owned(),
        file: FileObject::from(made.file),
        rows: made.rows as u64,
        unused: made.unused as u64,
    }))
}
