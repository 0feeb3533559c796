//! `/v1/preferences`: datasets of pairs that a judge has labelled.

use axum::{Json, extract::State};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::{Reading, Training},
    error::{ApiError, ErrorEnvelope},
    extract::{Id, IdempotencyHeader, IdempotencyKey, JsonObject, Query},
    jobs::Object,
    list::{List, Paging},
};
use crate::domain::{AnswerSampling, Failure, JobStatus, LabelReport, Labelling, PairJudge};

/// Pairs to find: two answers of a model to each prompt of a file, or the pairs of a file as they are.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document; the service reads it field by field")]
pub struct PreferencesRequest {
    /// Rows of messages that end with the user's, or pairs in any of their formats.
    file: String,
    judge: PairJudge,
    /// Who answers the prompts: a base or a tuned model. Not for a file of pairs.
    model: Option<String>,
    /// By what a model judges: a text, or a list of them.
    #[schema(value_type = Option<Vec<String>>)]
    criteria: Option<Value>,
    sampling: Option<AnswerSampling>,
    /// Pairs whose label is nearer to ½ than this are left out, 0 to 0.49. Default 0.
    #[schema(minimum = 0, maximum = 0.49)]
    min_margin: Option<f64>,
    /// Share of the rows that the model may leave unanswered or the judge unjudged; with more the task fails.
    /// Default 0.5.
    #[schema(minimum = 0, maximum = 1)]
    max_dropped: Option<f64>,
    metadata: Option<Object>,
}

/// A task that labels pairs, and what it made.
#[derive(Serialize, ToSchema)]
pub struct PreferencesObject {
    /// `pref-…`
    pub id: String,
    /// Always `preferences`.
    pub object: String,
    /// Unix seconds.
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
    pub status: JobStatus,
    pub file: String,
    pub model: Option<String>,
    pub judge: PairJudge,
    pub criteria: Vec<String>,
    pub sampling: AnswerSampling,
    pub min_margin: f64,
    pub max_dropped: f64,
    /// Rows of the file, and those that are through.
    pub total: i64,
    pub done: i64,
    /// A file of pairs for dpo, ipo, orpo, simpo and reward_model, once succeeded. Each row has the probability of its
    /// label, which losses weigh by, and who judged it, by what, and what was said in each order.
    pub result_file: Option<String>,
    pub report: Option<LabelReport>,
    pub error: Option<Failure>,
    pub metadata: Option<Value>,
}

impl From<Labelling> for PreferencesObject {
    fn from(task: Labelling) -> Self {
        let spec = task.spec;
        Self {
            id: task.id,
            object: "preferences".to_owned(),
            created_at: task.created_at,
            started_at: task.started_at,
            finished_at: task.finished_at,
            status: task.status,
            file: spec.file,
            model: spec.model,
            judge: spec.judge,
            criteria: spec.criteria,
            sampling: spec.sampling,
            min_margin: spec.min_margin,
            max_dropped: spec.max_dropped,
            total: task.total,
            done: task.done,
            result_file: task.result_file,
            report: task.report,
            error: task.error,
            metadata: task.metadata,
        }
    }
}

/// Labels pairs in the background. Who is asked sees both answers, once in each order.
#[utoipa::path(post, path = "/v1/preferences", operation_id = "createPreferences", tag = "feedback",
    params(IdempotencyHeader), request_body = PreferencesRequest,
    responses(
        (status = 200, description = "The task is queued", body = PreferencesObject),
        (status = 400, description = "A field is wrong; `param` says which", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such file or model", body = ErrorEnvelope),
        (status = 409, description = "A request with this idempotency key is under way", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
        (status = 422, description = "The idempotency key was used for another request", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Training(caller): Training,
    IdempotencyKey(key): IdempotencyKey,
    JsonObject(body): JsonObject,
) -> Result<Json<PreferencesObject>, ApiError> {
    Ok(Json(state.service.create_preferences(&caller, key, body).await?.into()))
}

/// The project's tasks, newest first.
#[utoipa::path(get, path = "/v1/preferences", operation_id = "listPreferences", tag = "feedback", params(Paging),
    responses(
        (status = 200, description = "A page of tasks", body = List<PreferencesObject>),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "`after` is no task", body = ErrorEnvelope),
    ))]
pub async fn list(
    State(state): State<AppState>,
    Reading(project): Reading,
    Query(paging): Query<Paging>,
) -> Result<Json<List<PreferencesObject>>, ApiError> {
    let page = state.service.db.labellings(&project, paging.after.as_deref(), paging.limit()?).await?;
    let data = page.data.into_iter().map(PreferencesObject::from).collect();
    Ok(Json(List::new(data, page.has_more, |task| &task.id)))
}

/// One task.
#[utoipa::path(get, path = "/v1/preferences/{preferences_id}", operation_id = "retrievePreferences", tag = "feedback",
    params(("preferences_id" = String, Path, description = "`pref-…`")),
    responses(
        (status = 200, description = "The task", body = PreferencesObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such task", body = ErrorEnvelope),
    ))]
pub async fn retrieve(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
) -> Result<Json<PreferencesObject>, ApiError> {
    Ok(Json(state.service.preferences(&project, &id).await?.into()))
}

/// Ends a task. What it has labelled so far is thrown away.
#[utoipa::path(post, path = "/v1/preferences/{preferences_id}/cancel", operation_id = "cancelPreferences",
    tag = "feedback", params(("preferences_id" = String, Path, description = "`pref-…`")),
    responses(
        (status = 200, description = "It ends", body = PreferencesObject),
        (status = 400, description = "It has ended already", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such task", body = ErrorEnvelope),
    ))]
pub async fn cancel(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(id): Id,
) -> Result<Json<PreferencesObject>, ApiError> {
    Ok(Json(state.service.cancel_preferences(&caller, &id).await?.into()))
}
