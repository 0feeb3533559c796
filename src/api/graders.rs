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
use crate::{
    domain::spec::Grader,
    jobs::judge::{Graded, Spent},
};

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
    /// `prompt_tokens` and `completion_tokens` of each model that was asked.
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
        (status = 404, description = "No such model to ask", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
    ))]
pub async fn run(
    State(state): State<AppState>,
    Training(caller): Training,
    JsonObject(body): JsonObject,
) -> Result<Json<GraderRun>, ApiError> {
    let begun = Instant::now();
    let trial = state.service.run_grader(&caller.project, body).await?;
    let grader = json!(trial.grader);
    let (reward, parts, spent, fault, silent) = match trial.graded {
        Ok(Graded { reward: Ok(reward), parts, spent }) => (reward, parts, spent, None, None),
        Ok(Graded { reward: Err(why), parts, spent }) => (0.0, parts, spent, None, Some(why.0)),
        Err(error) => (0.0, Vec::new(), Spent::default(), Some(error.to_string()), None),
    };
    let scores: Map<String, Value> = parts.into_iter().map(|(key, score)| (key, json!(score))).collect();
    let tokens: u64 = spent.0.values().map(|(read, written)| read + written).sum();
    let usage = |(model, (read, written)): (String, (u64, u64))| {
        (model, json!({"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}))
    };
    let usage: Map<String, Value> = spent.0.into_iter().map(usage).collect();
    let errors = json!({
        "formula_parse_error": false,
        "sample_parse_error": false,
        "truncated_observation_error": false,
        "unresponsive_reward_error": silent.is_some(),
        "invalid_variable_error": fault.is_some(),
        "other_error": false,
        "python_grader_server_error": false,
        "python_grader_server_error_type": null,
        "python_grader_runtime_error": false,
        "python_grader_runtime_error_details": null,
        "model_grader_server_error": false,
        "model_grader_refusal_error": false,
        "model_grader_parse_error": false,
        "model_grader_server_error_details": silent,
        "details": fault.or(silent.clone()),
    });
    Ok(Json(GraderRun {
        reward,
        metadata: json!({
            "name": grader["name"], "type": grader["type"], "errors": errors,
            "execution_time": begun.elapsed().as_secs_f64(), "scores": scores, "token_usage": (tokens > 0).then_some(tokens),
            "sampled_model_name": usage.keys().next(),
        }),
        sub_rewards: scores,
        model_grader_token_usage_per_model: usage,
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
        (status = 404, description = "No such model to ask", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
    ))]
pub async fn validate(
    State(state): State<AppState>,
    Training(caller): Training,
    JsonObject(body): JsonObject,
) -> Result<Json<ValidatedGrader>, ApiError> {
    Ok(Json(ValidatedGrader { grader: state.service.validate_grader(&caller.project, body).await? }))
}
