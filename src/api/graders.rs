//! `/v1/fine_tuning/alpha/graders`: graders tried before a job uses them.

use std::time::Instant;

use axum::{Json, extract::State};
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::{
    AppState,
    auth::Training,
    error::{ApiError, ErrorEnvelope},
    extract::JsonObject,
    jobs::Object,
};
use crate::domain::spec::Grader;

/// A grader to try on one text.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document; the service reads it field by field")]
pub struct RunGrader {
    grader: Grader,
    /// The dataset's row, for `{{item.…}}`.
    item: Option<Object>,
    /// What the model wrote, for `{{sample.…}}`.
    model_sample: String,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document; the service reads it field by field")]
pub struct ValidateGrader {
    grader: Grader,
}

/// OpenAI's answer to a trial.
#[derive(Serialize, ToSchema)]
pub struct GraderRun {
    /// 0 when there is an error; `metadata.errors` says which.
    pub reward: f64,
    /// `name`, `type`, `errors`, `execution_time` in seconds, `scores`.
    pub metadata: Value,
    /// Of each grader inside a multi grader.
    #[schema(value_type = std::collections::HashMap<String, f64>)]
    pub sub_rewards: Map<String, Value>,
    /// Always empty: no grader asks a model here.
    #[schema(value_type = std::collections::HashMap<String, Value>)]
    pub model_grader_token_usage_per_model: Map<String, Value>,
}

/// The grader as it was understood.
#[derive(Serialize, ToSchema)]
pub struct ValidatedGrader {
    pub grader: Grader,
}

/// Grades one text.
#[utoipa::path(post, path = "/v1/fine_tuning/alpha/graders/run", operation_id = "runGrader", tag = "fine-tuning",
    request_body = RunGrader,
    responses(
        (status = 200, description = "The reward, or what is wrong with the text or the row", body = GraderRun),
        (status = 400, description = "The grader is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
    ))]
pub async fn run(
    State(state): State<AppState>,
    _caller: Training,
    JsonObject(body): JsonObject,
) -> Result<Json<GraderRun>, ApiError> {
    let begun = Instant::now();
    let graded = state.service.run_grader(body)?;
    let grader = json!(graded.grader);
    let fault = graded.reward.as_ref().err().map(ToString::to_string);
    let scores: Map<String, Value> = graded.parts.into_iter().map(|(key, score)| (key, json!(score))).collect();
    let errors = json!({
        "formula_parse_error": false,
        "sample_parse_error": false,
        "truncated_observation_error": false,
        "unresponsive_reward_error": false,
        "invalid_variable_error": fault.is_some(),
        "other_error": false,
        "python_grader_server_error": false,
        "python_grader_server_error_type": null,
        "python_grader_runtime_error": false,
        "python_grader_runtime_error_details": null,
        "model_grader_server_error": false,
        "model_grader_refusal_error": false,
        "model_grader_parse_error": false,
        "model_grader_server_error_details": null,
        "details": fault,
    });
    Ok(Json(GraderRun {
        reward: graded.reward.unwrap_or(0.0),
        metadata: json!({
            "name": grader["name"], "type": grader["type"], "errors": errors,
            "execution_time": begun.elapsed().as_secs_f64(), "scores": scores, "token_usage": null,
            "sampled_model_name": null,
        }),
        sub_rewards: scores,
        model_grader_token_usage_per_model: Map::new(),
    }))
}

/// Checks a grader.
#[utoipa::path(post, path = "/v1/fine_tuning/alpha/graders/validate", operation_id = "validateGrader",
    tag = "fine-tuning", request_body = ValidateGrader,
    responses(
        (status = 200, description = "The grader can be used", body = ValidatedGrader),
        (status = 400, description = "The grader is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
    ))]
pub async fn validate(
    State(state): State<AppState>,
    _caller: Training,
    JsonObject(body): JsonObject,
) -> Result<Json<ValidatedGrader>, ApiError> {
    Ok(Json(ValidatedGrader { grader: state.service.validate_grader(body)? }))
}
