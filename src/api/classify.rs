//! `/v1/classify`: scores of reward models.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::Inference,
    error::{ApiError, ErrorEnvelope},
    extract::JsonObject,
    jobs::Object,
};

/// The body of a request for scores.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document; the service reads it field by field")]
pub struct CreateClassification {
    /// A tuned model of the objective `reward_model`.
    model: String,
    /// 1 to 256 texts, each as a row of a training file: `{"messages": [… an answer last]}`, or
    /// `{"prompt": "…", "completion": "…"}`. A single one may stand without the array.
    input: Vec<Object>,
}

/// The score of one text.
#[derive(Serialize, ToSchema)]
pub struct Classification {
    /// Always `classification`.
    pub object: String,
    /// The text's place in the request.
    pub index: u64,
    /// Higher is better. Differences mean something, the level does not.
    pub score: f32,
}

#[derive(Serialize, ToSchema)]
pub struct ClassificationUsage {
    pub prompt_tokens: u64,
    pub total_tokens: u64,
}

#[derive(Serialize, ToSchema)]
pub struct ClassificationList {
    /// Always `list`.
    pub object: String,
    pub model: String,
    pub data: Vec<Classification>,
    pub usage: ClassificationUsage,
}

/// Scores texts with a reward model.
#[utoipa::path(post, path = "/v1/classify", operation_id = "createClassification", tag = "chat",
    request_body = CreateClassification,
    responses(
        (status = 200, description = "A score for each text", body = ClassificationList),
        (status = 400, description = "A field is wrong, or the model writes instead of scoring", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such model", body = ErrorEnvelope),
        (status = 409, description = "The adapter cannot be loaded", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
        (status = 429, description = "Too many requests wait", body = ErrorEnvelope),
        (status = 503, description = "The store is away or the server stops", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Inference(project): Inference,
    JsonObject(body): JsonObject,
) -> Result<Json<ClassificationList>, ApiError> {
    let found = state.service.classify(&project, body).await?;
    let data = found.scores.into_iter().zip(0..).map(|(score, index)| Classification {
        object: "classification".to_owned(),
        index,
        score,
    });
    let usage = ClassificationUsage { prompt_tokens: found.prompt_tokens, total_tokens: found.prompt_tokens };
    Ok(Json(ClassificationList { object: "list".to_owned(), model: found.model, data: data.collect(), usage }))
}
