//! `/v1/embeddings`: texts as vectors, of a base or of an adapter on it.

use axum::{Json, extract::State};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    AppState,
    auth::Inference,
    error::{ApiError, ErrorEnvelope},
    extract::JsonObject,
    prompt::Prompt,
};
use crate::{
    inference::Pooling,
    service::{
        embed::ToEmbed,
        fields::{Unsupported, read, refuse_unsupported},
        mix::MixPart,
    },
};

const UNSUPPORTED: [Unsupported; 1] = [Unsupported::always("user")];

/// Inputs of one request.
const MAX_INPUTS: usize = 256;

/// How a vector is written.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum EncodingFormat {
    #[default]
    Float,
    /// Of little-endian 32-bit numbers.
    Base64,
}

/// How one vector is made of the hidden states of an input's tokens.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum PoolingName {
    #[default]
    Mean,
    Last,
}

/// Texts to embed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingRequest {
    model: String,
    /// A text, token ids, or a list of either (at most 256).
    #[schema(value_type = Value)]
    input: Prompt,
    /// Beyond OpenAI: LoRA adapters of this base that are mixed for this request, at most 8; `model` is then the base.
    adapters: Option<Vec<MixPart>>,
    /// Default `float`.
    encoding_format: Option<EncodingFormat>,
    /// The first so many numbers, at most the model's width; the vector has length 1 again.
    dimensions: Option<u64>,
    /// Beyond OpenAI. Default `mean`.
    pooling: Option<PoolingName>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct EmbeddingList {
    /// Always `list`.
    pub object: String,
    pub data: Vec<Embedding>,
    pub model: String,
    pub usage: EmbeddingUsage,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Embedding {
    /// Always `embedding`.
    pub object: String,
    pub index: u64,
    /// Numbers, or text in base64.
    #[schema(value_type = Value)]
    pub embedding: Vector,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Serialize, ToSchema)]
pub struct EmbeddingUsage {
    pub prompt_tokens: u64,
    pub total_tokens: u64,
}

/// Makes a vector of length 1 for each input.
#[utoipa::path(post, path = "/v1/embeddings", operation_id = "createEmbedding", tag = "embeddings",
    request_body = EmbeddingRequest,
    responses(
        (status = 200, description = "The vectors, in the order of the inputs", body = EmbeddingList),
        (status = 400, description = "A field is wrong; `param` says which", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such model", body = ErrorEnvelope),
        (status = 409, description = "The adapter's files cannot be used", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
        (status = 429, description = "Too many requests wait", body = ErrorEnvelope),
        (status = 503, description = "The server stops, or its store is away", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Inference(project): Inference,
    JsonObject(body): JsonObject,
) -> Result<Json<EmbeddingList>, ApiError> {
    answer(&state, &project, body, false).await
}

/// The answer to a request's body; one in the background comes after all others.
pub async fn answer(
    state: &AppState,
    project: &str,
    mut body: Map<String, Value>,
    is_background: bool,
) -> Result<Json<EmbeddingList>, ApiError> {
    refuse_unsupported(&mut body, &UNSUPPORTED)?;
    let request: EmbeddingRequest = read(body)?;
    let model = state.service.model_of(project, &request.model, request.adapters.as_deref()).await?;
    let pooling = match request.pooling.unwrap_or_default() {
        PoolingName::Mean => Pooling::Mean,
        PoolingName::Last => Pooling::Last,
    };
    let inputs = request.input.ids(&model, "input", MAX_INPUTS)?;
    let wanted = ToEmbed { model: &model, project, inputs, pooling, dimensions: request.dimensions, is_background };
    let embedded = state.service.embed(wanted).await?;
    let tokens = embedded.iter().map(|one| one.tokens).sum();
    let format = request.encoding_format.unwrap_or_default();
    let data = (0..).zip(embedded).map(|(index, one)| Embedding {
        object: "embedding".to_owned(),
        index,
        embedding: match format {
            EncodingFormat::Float => Vector::Numbers(one.vector),
            EncodingFormat::Base64 => {
                let bytes: Vec<u8> = one.vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                Vector::Base64(STANDARD.encode(bytes))
            }
        },
    });
    Ok(Json(EmbeddingList {
        object: "list".to_owned(),
        data: data.collect(),
        model: model.name,
        usage: EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens },
    }))
}
