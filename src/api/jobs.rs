//! `/v1/fine_tuning/jobs`.

use std::{convert::Infallible, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, header::ACCEPT},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event as SseEvent, KeepAlive},
    },
};
use futures::{Stream, stream};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    AppState,
    auth::{Reading, Training},
    error::{ApiError, ErrorEnvelope},
    extract::{Id, IdempotencyHeader, IdempotencyKey, JsonObject, Query},
    list::{List, Paging},
};
use crate::{
    db::{CheckpointRecord, Wish},
    domain::{self, EventKind, Failure, Job, JobStatus, Metrics},
    service::Problem,
};

/// The body of a new job. Unknown fields are refused by name.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document; the service reads it field by field")]
pub struct CreateJob {
    /// A base, or a tuned model to continue.
    model: String,
    /// `file-…`. Needed, unless `feedback` stands in its place.
    training_file: Option<String>,
    /// Trains on what people said of answers: an export (`/v1/feedback/export` without its `format`, which follows
    /// from `method`) becomes the training file.
    feedback: Option<Object>,
    validation_file: Option<String>,
    /// Part of the tuned model's name: 1 to 64 letters, digits, dots, dashes, underscores.
    suffix: Option<String>,
    /// The same seed, data and settings give the same bytes. Default 42.
    seed: Option<u64>,
    /// The objective, in OpenAI's shape: `{"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, …}}}`. Default
    /// supervised; `GET /v1/methods` lists all.
    method: Option<Object>,
    /// The fine-tuning method (how the change is parametrised) and its knobs in PEFT's names. Default LoRA, r 8.
    adapter: Option<Object>,
    /// The loop's settings; see `Training`.
    training: Option<Object>,
    /// At most 16 pairs of strings.
    metadata: Option<Object>,
    /// Higher runs first, −100 to 100. Default 0.
    priority: Option<i64>,
    /// Check everything, answer the resolved job, queue nothing.
    dry_run: Option<bool>,
}

/// Any JSON object.
#[derive(ToSchema)]
#[schema(value_type = std::collections::HashMap<String, Value>)]
#[expect(dead_code, reason = "stands for free-form objects in the document")]
pub struct Object(Value);

/// OpenAI's job object, with the resolved `adapter` and `training` beside it.
#[derive(Serialize, ToSchema)]
pub struct JobObject {
    pub id: String,
    /// Always `fine_tuning.job`.
    pub object: String,
    /// Unix seconds.
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
    pub status: JobStatus,
    pub model: String,
    /// The tuned model's name once the job has succeeded.
    pub fine_tuned_model: Option<String>,
    pub organization_id: String,
    pub training_file: String,
    pub validation_file: Option<String>,
    pub result_files: Vec<String>,
    pub trained_tokens: Option<i64>,
    pub error: Option<Failure>,
    pub seed: u64,
    pub estimated_finish: Option<i64>,
    /// `n_epochs`, `batch_size`, `learning_rate_multiplier` as they were resolved.
    pub hyperparameters: Value,
    pub method: Value,
    pub metadata: Option<Value>,
    pub integrations: Vec<Value>,
    /// Every knob of the method, every `auto` filled in.
    pub adapter: Value,
    pub training: domain::Training,
    pub priority: i64,
}

impl From<Job> for JobObject {
    fn from(job: Job) -> Self {
        let training = job.spec.training;
        let objective = job.spec.objective;
        let multiplier = training.learning_rate / (job.spec.adapter.default_learning_rate() * objective.rate());
        let hyperparameters = json!({
            "n_epochs": training.n_epochs,
            "batch_size": training.batch_size,
            "learning_rate_multiplier": multiplier,
        });
        let mut of_method = objective.knobs();
        if let (Some(all), Some(shared)) = (of_method.as_object_mut(), hyperparameters.as_object()) {
            all.extend(shared.clone());
        }
        let mut of_method = json!({"hyperparameters": of_method});
        if let Some(Some(grader)) = objective.grader() {
            of_method["grader"] = json!(grader);
        }
        let name = objective.type_name();
        Self {
            id: job.id,
            object: "fine_tuning.job".to_owned(),
            created_at: job.created_at,
            started_at: job.started_at,
            finished_at: job.finished_at,
            status: job.status,
            model: job.model,
            fine_tuned_model: job.fine_tuned_model,
            organization_id: job.project,
            training_file: job.training_file,
            validation_file: job.validation_file,
            result_files: job.result_files,
            trained_tokens: job.trained_tokens,
            error: job.error,
            seed: job.spec.seed,
            estimated_finish: job.estimated_finish,
            method: json!({"type": name, name: of_method}),
            hyperparameters,
            metadata: job.metadata,
            integrations: Vec::new(),
            adapter: serde_json::to_value(&job.spec.adapter).unwrap_or_default(),
            training,
            priority: job.priority,
        }
    }
}

/// Starts a fine-tuning job, after its request and data were checked.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs", operation_id = "createFineTuningJob", tag = "fine-tuning",
    params(IdempotencyHeader), request_body = CreateJob,
    responses(
        (status = 200, description = "The job is queued (or would be, in a dry run)", body = JobObject),
        (status = 400, description = "A field or a line of the data is wrong; `param` says which", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such model or file", body = ErrorEnvelope),
        (status = 409, description = "The adapter to continue cannot be read, or a request with this idempotency key \
            is under way", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
        (status = 422, description = "The idempotency key was used for another request", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Training(caller): Training,
    IdempotencyKey(key): IdempotencyKey,
    JsonObject(body): JsonObject,
) -> Result<Json<JobObject>, ApiError> {
    Ok(Json(state.service.create_job(&caller, key, body).await?.into()))
}

/// The project's jobs, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs", operation_id = "listFineTuningJobs", tag = "fine-tuning",
    params(Paging),
    responses(
        (status = 200, description = "A page of jobs", body = List<JobObject>),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "`after` is no job", body = ErrorEnvelope),
    ))]
pub async fn list(
    State(state): State<AppState>,
    Reading(project): Reading,
    Query(paging): Query<Paging>,
) -> Result<Json<List<JobObject>>, ApiError> {
    let page = state.service.db.jobs(&project, paging.after.as_deref(), paging.limit()?).await?;
    let data = page.data.into_iter().map(JobObject::from).collect();
    Ok(Json(List::new(data, page.has_more, |job| &job.id)))
}

/// One job.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}", operation_id = "retrieveFineTuningJob",
    tag = "fine-tuning", params(("job_id" = String, Path, description = "`ftjob-…`")),
    responses(
        (status = 200, description = "The job", body = JobObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such job", body = ErrorEnvelope),
    ))]
pub async fn retrieve(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
) -> Result<Json<JobObject>, ApiError> {
    Ok(Json(state.service.job(&project, &id).await?.into()))
}

macro_rules! steering {
    ($name:ident, $path:literal, $operation:literal, $wish:ident, $doc:literal) => {
        #[doc = $doc]
        #[utoipa::path(post, path = $path, operation_id = $operation, tag = "fine-tuning",
                            params(("job_id" = String, Path, description = "`ftjob-…`")),
                            responses(
                                (status = 200, description = "The job as it is now", body = JobObject),
                                (status = 400, description = "The job's state does not allow it", body = ErrorEnvelope),
                                (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
                                (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
                                (status = 404, description = "No such job", body = ErrorEnvelope),
                            ))]
        pub async fn $name(
            State(state): State<AppState>,
            Training(caller): Training,
            Id(id): Id,
        ) -> Result<Json<JobObject>, ApiError> {
            Ok(Json(state.service.steer(&caller, &id, Wish::$wish).await?.into()))
        }
    };
}

steering!(
    cancel,
    "/v1/fine_tuning/jobs/{job_id}/cancel",
    "cancelFineTuningJob",
    Cancel,
    "Cancels a job that has not ended; a running one stops within a step."
);
steering!(
    pause,
    "/v1/fine_tuning/jobs/{job_id}/pause",
    "pauseFineTuningJob",
    Pause,
    "Pauses a job: a checkpoint is written, and `resume` goes on from it."
);
steering!(resume, "/v1/fine_tuning/jobs/{job_id}/resume", "resumeFineTuningJob", Resume, "Lets a paused job go on.");

/// OpenAI's event object.
#[derive(Serialize, ToSchema)]
pub struct EventObject {
    pub id: String,
    /// Always `fine_tuning.job.event`.
    pub object: String,
    /// Unix seconds.
    pub created_at: i64,
    /// `info`, `warn` or `error`.
    pub level: String,
    pub message: String,
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// `Metrics` for events of type metrics.
    pub data: Option<Value>,
}

impl From<domain::Event> for EventObject {
    fn from(event: domain::Event) -> Self {
        Self {
            id: event.id,
            object: "fine_tuning.job.event".to_owned(),
            created_at: event.created_at,
            level: event.level,
            message: event.message,
            kind: event.kind,
            data: event.data,
        }
    }
}

/// A job's events, newest first; with `Accept: text/event-stream` as they come, oldest first, until the job ends.
/// `Last-Event-ID` goes on behind an event.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}/events", operation_id = "listFineTuningEvents",
    tag = "fine-tuning", params(("job_id" = String, Path, description = "`ftjob-…`"), Paging),
    responses(
        (status = 200, description = "A page of events, or a stream of them", body = List<EventObject>),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such job, or `after` is no event of it", body = ErrorEnvelope),
    ))]
pub async fn events(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
    Query(paging): Query<Paging>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let job = state.service.job(&project, &id).await?;
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if header(ACCEPT.as_str()).is_some_and(|accept| accept.contains("text/event-stream")) {
        let last = header("last-event-id").map_or(Ok(0), str::parse::<i64>);
        let last = last.map_err(|_| {
            Problem::invalid("Last-Event-ID", "invalid_type", "Last-Event-ID is not an id that this stream sent")
        })?;
        let events = follow(state, project, job.id, last);
        return Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response());
    }
    let page = state.service.db.events(&project, &id, paging.after.as_deref(), paging.limit()?).await?;
    let data = page.data.into_iter().map(EventObject::from).collect();
    Ok(Json(List::new(data, page.has_more, |event: &EventObject| &event.id)).into_response())
}

/// How often a followed job is looked at.
const LOOK: Duration = Duration::from_millis(250);

fn follow(
    state: AppState,
    project: String,
    job: String,
    last: i64,
) -> impl Stream<Item = Result<SseEvent, Infallible>> {
    struct Follow {
        state: AppState,
        project: String,
        job: String,
        last: i64,
        pending: std::collections::VecDeque<domain::Event>,
        ended: bool,
    }
    let start = Follow { state, project, job, last, pending: Default::default(), ended: false };
    stream::unfold(start, |mut follow| async move {
        loop {
            if let Some(event) = follow.pending.pop_front() {
                follow.last = event.seq;
                let id = event.seq.to_string();
                let data = serde_json::to_string(&EventObject::from(event)).unwrap_or_default();
                return Some((Ok(SseEvent::default().id(id).data(data)), follow));
            }
            if follow.ended {
                return None;
            }
            // The state first: events of a job that has ended are all there.
            let job = follow.state.service.job(&follow.project, &follow.job).await.ok()?;
            let events = follow.state.service.db.events_since(&follow.job, follow.last, 500).await.ok()?;
            follow.ended = events.is_empty() && (job.status.is_final() || !follow.state.is_ready());
            if events.is_empty() && !follow.ended {
                tokio::time::sleep(LOOK).await;
            }
            follow.pending.extend(events);
        }
    })
}

/// OpenAI's checkpoint object. Its name can be the `model` of a request.
#[derive(Serialize, ToSchema)]
pub struct CheckpointObject {
    pub id: String,
    /// Always `fine_tuning.job.checkpoint`.
    pub object: String,
    /// Unix seconds.
    pub created_at: i64,
    pub fine_tuned_model_checkpoint: String,
    pub fine_tuning_job_id: String,
    pub step_number: i64,
    pub metrics: Metrics,
}

impl From<CheckpointRecord> for CheckpointObject {
    fn from(checkpoint: CheckpointRecord) -> Self {
        Self {
            id: checkpoint.id,
            object: "fine_tuning.job.checkpoint".to_owned(),
            created_at: checkpoint.created_at,
            fine_tuned_model_checkpoint: checkpoint.model,
            fine_tuning_job_id: checkpoint.job_id,
            step_number: checkpoint.step,
            metrics: checkpoint.metrics,
        }
    }
}

/// A job's checkpoints, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{job_id}/checkpoints", operation_id = "listFineTuningCheckpoints",
    tag = "fine-tuning", params(("job_id" = String, Path, description = "`ftjob-…`"), Paging),
    responses(
        (status = 200, description = "A page of checkpoints", body = List<CheckpointObject>),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such job, or `after` is no checkpoint of it", body = ErrorEnvelope),
    ))]
pub async fn checkpoints(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
    Query(paging): Query<Paging>,
) -> Result<Json<List<CheckpointObject>>, ApiError> {
    state.service.job(&project, &id).await?;
    let limit = paging.limit()?;
    // The one of step 0 is the job's own: there is nothing to serve in it yet.
    let mut all = state.service.db.checkpoints(&id).await?;
    all.retain(|checkpoint| checkpoint.step > 0);
    if let Some(after) = &paging.after {
        let at = all.iter().position(|c| c.id == *after).ok_or_else(|| Problem::not_found("checkpoint", after))?;
        all.drain(..=at);
    }
    let has_more = all.len() > limit;
    all.truncate(limit);
    let data = all.into_iter().map(CheckpointObject::from).collect();
    Ok(Json(List::new(data, has_more, |checkpoint| &checkpoint.id)))
}
