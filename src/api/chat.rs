//! `/v1/chat/completions`.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::Inference,
    error::{ApiError, ErrorEnvelope},
    extract::JsonObject,
    request::Asked,
    said::{Heard, Speaker, ToolCallObject},
    stream::{Pieces, respond, side_by_side},
};
use crate::{
    domain::{StoredCompletion, id},
    inference::{Resident, TokenLogprob},
    jobs::now,
    service::{
        Problem, Service,
        chat::{messages, prompt},
        fields::{Unsupported, in_range, refuse_unsupported},
        format::{ResponseFormat, grammar},
        generate::{Counts, Generation, Piece, Wanted},
        mix::MixPart,
        tools::{ToolChoice, ToolStyle, tools},
    },
};

/// What OpenAI documents and this server does not do, yet.
const UNSUPPORTED: [Unsupported; 17] = [
    Unsupported::always("audio"),
    Unsupported::always("function_call"),
    Unsupported::always("functions"),
    Unsupported::always("metadata"),
    Unsupported { name: "modalities", neutral: |v| *v == serde_json::json!(["text"]) },
    Unsupported::always("moderation"),
    Unsupported::always("prediction"),
    Unsupported::always("prompt_cache_key"),
    Unsupported::always("prompt_cache_retention"),
    Unsupported::always("prompt_cache_options"),
    Unsupported::always("reasoning_effort"),
    Unsupported::always("safety_identifier"),
    Unsupported { name: "service_tier", neutral: |v| matches!(v.as_str(), Some("auto" | "default")) },
    Unsupported::always("user"),
    Unsupported::always("verbosity"),
    Unsupported::always("web_search_options"),
    Unsupported::always("suffix"),
];

/// A conversation to answer. Fields that OpenAI documents and that are not listed here answer 400.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatRequest {
    model: String,
    /// `role` (system, developer, user, assistant) and `content` (a text, or parts of type text).
    #[schema(value_type = Vec<std::collections::HashMap<String, Value>>)]
    messages: Vec<Value>,
    /// At most this many tokens. Default: what the context leaves.
    max_completion_tokens: Option<u64>,
    /// The older name of `max_completion_tokens`.
    max_tokens: Option<u64>,
    logprobs: Option<bool>,
    /// Alternatives with each token's log-probability, 0 to 20; needs `logprobs`.
    top_logprobs: Option<u64>,
    /// Keeps the conversation and its answers on the server, for feedback. Default false.
    store: Option<bool>,
    /// `{"type": "text"}`, `{"type": "json_object"}`, or `{"type": "json_schema", "json_schema": {"name", "schema",
    /// "strict"}}`. A schema that the answer cannot be held to is an error, `strict` or not; `strict` asks besides for
    /// what OpenAI asks of strict schemas.
    #[schema(value_type = Option<std::collections::HashMap<String, Value>>)]
    response_format: Option<ResponseFormat>,
    /// Functions that the answer may call, at most 128: `{"type": "function", "function": {"name", "description",
    /// "parameters", "strict"}}`. The base's chat template must have a place for them.
    #[schema(value_type = Option<Vec<std::collections::HashMap<String, Value>>>)]
    tools: Option<Vec<Value>>,
    /// `none`, `auto` (the default), `required`, or `{"type": "function", "function": {"name"}}`. The last two hold the
    /// answer to calls whose arguments keep to the functions' parameters; `auto` does so for `strict` functions.
    #[schema(value_type = Option<Value>)]
    tool_choice: Option<ToolChoice>,
    /// Beyond OpenAI: LoRA adapters of this base that are mixed for this request, at most 8; `model` is then the base.
    adapters: Option<Vec<MixPart>>,
    /// Whether one answer may hold several calls. Default true.
    parallel_tool_calls: Option<bool>,
}

type Request = Asked<ChatRequest>;

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Tokens of prompts that began like others of this project and model, and were not read again.
    pub cached_tokens: u64,
}

impl Usage {
    /// A prompt has `n` completions, and counts once.
    pub fn new(prompt_tokens: u64, counts: &[Counts], n: usize) -> Self {
        let completion_tokens = counts.iter().map(|counts| counts.completion_tokens).sum();
        let cached_tokens = counts.iter().step_by(n.max(1)).map(|counts| counts.cached_tokens).sum();
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    pub id: String,
    /// `chat.completion`, or `chat.completion.chunk` in a stream.
    pub object: String,
    /// Unix seconds.
    pub created: i64,
    pub model: String,
    /// The adapter's generation, or the base's hash: the same fingerprint, the same weights.
    pub system_fingerprint: String,
    pub choices: Vec<ChatChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<Message>,
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`; null before the end.
    pub finish_reason: Option<String>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Message {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    /// In a stream each call comes in pieces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCallObject>>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatLogprob>,
    pub refusal: Option<Vec<ChatLogprob>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

impl ChatLogprob {
    fn new(resident: &Resident, found: &TokenLogprob) -> Self {
        let of = |id: u32| resident.text.tokenizer.token_bytes(id);
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let top = found.top.iter().map(|(id, logprob)| {
            let bytes = of(*id);
            TopLogprob { token: shown(&bytes), logprob: *logprob, bytes }
        });
        let bytes = of(found.id);
        Self { token: shown(&bytes), logprob: found.logprob, top_logprobs: top.collect(), bytes }
    }
}

/// Answers a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", operation_id = "createChatCompletion", tag = "chat",
    request_body = Request,
    responses(
        (status = 200, description = "The answer; with `stream`, server-sent events that end with [DONE]",
            body = ChatCompletion),
        (status = 400, description = "A field is wrong; `param` says which", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such model", body = ErrorEnvelope),
        (status = 409, description = "The adapter's files cannot be used", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
        (status = 422, description = "No token of the model keeps to the format", body = ErrorEnvelope),
        (status = 429, description = "Too many requests wait", body = ErrorEnvelope),
        (status = 503, description = "The server stops, or its store is away", body = ErrorEnvelope),
    ))]
pub async fn create(
    State(state): State<AppState>,
    Inference(project): Inference,
    JsonObject(body): JsonObject,
) -> Result<Response, ApiError> {
    answer(&state, &project, body, false).await
}

/// The answer to a request's body; one in the background comes after all others.
pub async fn answer(
    state: &AppState,
    project: &str,
    mut body: Map<String, Value>,
    is_background: bool,
) -> Result<Response, ApiError> {
    refuse_unsupported(&mut body, &UNSUPPORTED)?;
    let request = Request::read(body)?;
    let with_usage = request.sampling.streamed()?;
    let (generations, answer) = start(state, project, &request, is_background).await?;
    let pieces = side_by_side(generations);
    match with_usage {
        Some(with_usage) => Ok(answer.stream(pieces, with_usage, state.service.clone())),
        None => Ok(Json(answer.collect(pieces, &state.service).await?).into_response()),
    }
}

async fn start(
    state: &AppState,
    project: &str,
    request: &Request,
    is_background: bool,
) -> Result<(Vec<Generation>, Answer), Problem> {
    let Request { own, sampling } = request;
    let n = sampling.answers()?;
    let logprobs = match (own.logprobs.unwrap_or(false), own.top_logprobs) {
        (false, Some(_)) => {
            return Err(Problem::invalid("top_logprobs", "invalid_combination", "top_logprobs needs logprobs"));
        }
        (false, None) => None,
        (true, top) => Some(in_range("top_logprobs", top.unwrap_or(0), 0, 20)? as usize),
    };
    let (max_tokens, max_tokens_param) = match (own.max_completion_tokens, own.max_tokens) {
        (Some(_), Some(_)) => {
            let message = "max_tokens and max_completion_tokens say the same: leave one out";
            return Err(Problem::invalid("max_tokens", "given_twice", message));
        }
        (Some(max), None) => (Some(max), "max_completion_tokens"),
        (None, max) => (max, "max_tokens"),
    };
    if max_tokens == Some(0) {
        return Err(Problem::invalid(max_tokens_param, "out_of_range", format!("{max_tokens_param} is 0, below 1")));
    }
    let store = own.store.unwrap_or(false);
    state.service.check_store(store)?;
    let model = state.service.model_of(project, &own.model, own.adapters.as_deref()).await?;
    let messages = messages(&own.messages)?;
    let given = own.tools.as_deref().unwrap_or_default();
    let tools = tools(&model, given, own.tool_choice.as_ref(), own.parallel_tool_calls).await?;
    if store && !given.is_empty() {
        let message = "answers of a request with tools cannot be kept";
        return Err(Problem::invalid("store", "invalid_combination", message));
    }
    let prompt = prompt(&model, &messages, tools.shown.as_deref())?;
    let prompt_tokens = prompt.len() as u64;
    let format = grammar(&model, own.response_format.as_ref()).await?;
    let grammar = match (format, tools.grammar) {
        (Some(_), Some(_)) => {
            let message = "tools hold the answer to calls and response_format to something else";
            return Err(Problem::invalid("response_format", "invalid_combination", message));
        }
        (format, forced) => format.or(forced),
    };
    let generations = state.service.generate(Wanted {
        model: &model,
        project,
        prompts: vec![prompt],
        max_tokens,
        max_tokens_param,
        prompt_param: "messages",
        fields: sampling,
        grammar,
        is_background,
        logprobs,
        prompt_logprobs: None,
    })?;
    let fingerprint = model.adapter.as_ref().map_or(&model.resident.base.info.hash, |a| &a.generation).clone();
    let answer = Answer {
        id: id::new("chatcmpl-"),
        model: model.name,
        fingerprint,
        resident: model.resident,
        prompt_tokens,
        n,
        with_logprobs: logprobs.is_some(),
        style: tools.style,
        kept: store.then(|| (project.to_owned(), messages)),
    };
    Ok((generations, answer))
}

/// What all chunks of an answer share.
struct Answer {
    id: String,
    model: String,
    fingerprint: String,
    resident: Resident,
    prompt_tokens: u64,
    n: u64,
    with_logprobs: bool,
    /// How calls are read out of it.
    style: Option<ToolStyle>,
    /// The project and the conversation, when the answers are to be kept.
    kept: Option<(String, Vec<Value>)>,
}

impl Answer {
    fn envelope(&self, object: &str, choices: Vec<ChatChoice>, usage: Option<Usage>) -> ChatCompletion {
        ChatCompletion {
            id: self.id.clone(),
            object: object.to_owned(),
            created: now(),
            model: self.model.clone(),
            system_fingerprint: self.fingerprint.clone(),
            choices,
            usage,
        }
    }

    /// Keeps the answers if the request asked for it; after this they can be spoken of.
    async fn keep(&self, choices: Vec<String>, service: &Service) -> Result<(), Problem> {
        let Some((project, messages)) = self.kept.clone() else { return Ok(()) };
        let (id, model, fingerprint) = (self.id.clone(), self.model.clone(), self.fingerprint.clone());
        let kept = StoredCompletion { id, project, model, fingerprint, created_at: now(), messages, choices };
        service.keep_completion(kept).await
    }

    async fn collect(&self, mut pieces: Pieces, service: &Service) -> Result<ChatCompletion, Problem> {
        let empty = |index| ChatChoice {
            index,
            message: Some(Message {
                role: Some("assistant".to_owned()),
                content: Some(String::new()),
                ..Message::default()
            }),
            delta: None,
            logprobs: self.with_logprobs.then(ChatLogprobs::default),
            finish_reason: None,
        };
        let mut choices: Vec<ChatChoice> = (0..self.n).map(empty).collect();
        let mut counts = vec![Counts::default(); choices.len()];
        let mut speakers: Vec<Speaker> = choices.iter().map(|_| Speaker::new(self.style)).collect();
        while let Some((index, piece, tokens)) = pieces.recv().await {
            let Some(choice) = choices.get_mut(index as usize) else { continue };
            counts[index as usize] = tokens;
            let (text, token, reason) = parts(piece?);
            let Heard { text, calls, reason } = speakers[index as usize].hear(text, reason);
            if let Some(message) = choice.message.as_mut() {
                message.content.get_or_insert_default().push_str(&text);
                for call in calls {
                    let all = message.tool_calls.get_or_insert_default();
                    match all.last_mut().filter(|_| call.id.is_none()) {
                        Some(last) => last.function.arguments.push_str(&call.function.arguments),
                        None => all.push(ToolCallObject { index: None, ..call }),
                    }
                }
            }
            if let (Some(all), Some(found)) = (&mut choice.logprobs, token) {
                all.content.push(ChatLogprob::new(&self.resident, &found));
            }
            choice.finish_reason = reason;
        }
        let text = |choice: &ChatChoice| choice.message.as_ref().and_then(|m| m.content.clone()).unwrap_or_default();
        self.keep(choices.iter().map(text).collect(), service).await?;
        let usage = Usage::new(self.prompt_tokens, &counts, self.n as usize);
        Ok(self.envelope("chat.completion", choices, Some(usage)))
    }

    fn stream(self, mut pieces: Pieces, with_usage: bool, service: Service) -> Response {
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(async move {
            let object = "chat.completion.chunk";
            let chunk = |index, delta, logprobs, finish_reason| {
                let choice = ChatChoice { index, message: None, delta: Some(delta), logprobs, finish_reason };
                self.envelope(object, vec![choice], None)
            };
            for index in 0..self.n {
                let role = Some("assistant".to_owned());
                let first = Message { role, content: Some(String::new()), ..Message::default() };
                if sender.send(Ok(chunk(index, first, None, None))).await.is_err() {
                    return;
                }
            }
            let mut counts = vec![Counts::default(); self.n as usize];
            let mut texts = vec![String::new(); self.n as usize];
            let mut speakers: Vec<Speaker> = texts.iter().map(|_| Speaker::new(self.style)).collect();
            while let Some((index, piece, tokens)) = pieces.recv().await {
                counts[index as usize] = tokens;
                let answer = match piece.map(parts) {
                    Err(problem) => Err(problem),
                    Ok((text, token, reason)) => {
                        let Heard { text, calls, reason } = speakers[index as usize].hear(text, reason);
                        texts[index as usize].push_str(&text);
                        let logprobs = token.map(|found| ChatLogprobs {
                            content: vec![ChatLogprob::new(&self.resident, &found)],
                            refusal: None,
                        });
                        if text.is_empty() && calls.is_empty() && logprobs.is_none() && reason.is_none() {
                            continue;
                        }
                        let delta = Message {
                            content: (!text.is_empty()).then_some(text),
                            tool_calls: (!calls.is_empty()).then_some(calls),
                            ..Message::default()
                        };
                        Ok(chunk(index, delta, logprobs, reason))
                    }
                };
                let failed = answer.is_err();
                if sender.send(answer).await.is_err() || failed {
                    return;
                }
            }
            if let Err(problem) = self.keep(texts, &service).await {
                _ = sender.send(Err(problem)).await;
                return;
            }
            if with_usage {
                let usage = Usage::new(self.prompt_tokens, &counts, self.n as usize);
                _ = sender.send(Ok(self.envelope(object, Vec::new(), Some(usage)))).await;
            }
        });
        respond(receiver)
    }
}

/// Text, the token's log-probability, and why it ended.
fn parts(piece: Piece) -> (String, Option<TokenLogprob>, Option<String>) {
    match piece {
        Piece::Prompt(_) => (String::new(), None, None),
        Piece::Text { text, token } => (text, token.and_then(|(_, found)| found), None),
        Piece::End { text, reason } => (text, None, Some(reason.to_owned())),
    }
}
