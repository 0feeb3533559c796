//! `/v1/classify`: scores of reward models, labels of texts, and tags of words.

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
use crate::service::classify::{LabelProbability, Said};

/// The body of a request for scores, labels or tags.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document; the service reads it field by field")]
pub struct CreateClassification {
    /// A tuned model of the objective `reward_model`, `sequence_classification` or `token_classification`.
    model: String,
    /// 1 to 256 texts. For a reward model each is `{"messages": [… an answer last]}`, or
    /// `{"prompt": "…", "completion": "…"}`; for a classifier of texts `{"text": "…"}` or a string; for one of tokens
    /// `{"tokens": ["…", …]}`. A single one may stand without the array.
    input: Vec<Object>,
}

/// What is said of one text.
#[derive(Serialize, ToSchema)]
pub struct Classification {
    /// Always `classification`.
    pub object: String,
    /// The text's place in the request.
    pub index: u64,
    /// Of a reward model: higher is better. Differences mean something, the level does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
    /// Of a classifier of texts: the likeliest label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// All of its labels, the likeliest first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<LabelProbability>>,
    /// Of a classifier of tokens: each word's likeliest tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<LabelProbability>>,
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

/// Scores, labels or tags texts with an adapter that was trained to.
#[utoipa::path(post, path = "/v1/classify", operation_id = "createClassification", tag = "chat",
    request_body = CreateClassification,
    responses(
        (status = 200, description = "What is said of each text", body = ClassificationList),
        (status = 400, description = "A field is wrong, or the model does not read such texts", body = ErrorEnvelope),
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
    let data = found.texts.into_iter().zip(0..).map(|(said, index)| {
        let object = "classification".to_owned();
        let empty = Classification { object, index, score: None, label: None, labels: None, tags: None };
        match said {
            Said::Score(score) => Classification { score: Some(score), ..empty },
            Said::Labels(labels) => {
                Classification { label: labels.first().map(|one| one.label.clone()), labels: Some(labels), ..empty }
            }
            Said::Tags(tags) => Classification { tags: Some(tags), ..empty },
        }
    });
    let usage = ClassificationUsage { prompt_tokens: found.prompt_tokens, total_tokens: found.prompt_tokens };
    Ok(Json(ClassificationList { object: "list".to_owned(), model: found.model, data: data.collect(), usage }))
}
