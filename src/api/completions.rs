//! `/v1/completions`: prompts as text or token ids, with `echo`.

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
    chat::{StreamOptions, Usage},
    error::{ApiError, ErrorEnvelope},
    extract::JsonObject,
    stream::{Pieces, respond, side_by_side},
};
use crate::{
    domain::id,
    inference::TokenLogprob,
    jobs::now,
    service::{
        Problem,
        catalogue::Model,
        fields::{Unsupported, in_range, read, refuse_unsupported},
        generate::{Generation, MAX_N, Piece, SamplingFields, Stop, Wanted},
    },
    text::Text,
};

const UNSUPPORTED: [Unsupported; 4] = [
    Unsupported { name: "best_of", neutral: |v| v.as_u64() == Some(1) },
    Unsupported { name: "suffix", neutral: |v| v.as_str() == Some("") },
    Unsupported::always("user"),
    Unsupported::always("metadata"),
];

/// Prompts of one request.
const MAX_PROMPTS: usize = 64;

/// A prompt to complete.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompletionRequest {
    model: String,
    /// A text, token ids, or a list of either (at most 64).
    #[schema(value_type = Value)]
    prompt: Prompt,
    /// Default 16. 0 with `echo` scores the prompt.
    max_tokens: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    #[schema(value_type = Option<std::collections::HashMap<String, f32>>)]
    logit_bias: Option<Map<String, Value>>,
    seed: Option<i64>,
    ignore_eos: Option<bool>,
    #[schema(value_type = Option<Value>)]
    stop: Option<Stop>,
    /// Completions of each prompt, 1 to 16.
    n: Option<u64>,
    /// Alternatives with each token's log-probability, 0 to 20.
    logprobs: Option<u64>,
    /// The prompt before its completion.
    echo: Option<bool>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    ManyIds(Vec<Vec<u32>>),
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Completion {
    pub id: String,
    /// Always `text_completion`.
    pub object: String,
    /// Unix seconds.
    pub created: i64,
    pub model: String,
    /// The adapter's generation, or the base's hash.
    pub system_fingerprint: String,
    pub choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    pub index: u64,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null before the end.
    pub finish_reason: Option<String>,
}

/// A place a token. Offsets count code points of the text.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    #[schema(value_type = Vec<Option<std::collections::HashMap<String, f32>>>)]
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
    pub text_offset: Vec<u64>,
}

impl CompletionLogprobs {
    /// `at` is the text's length in code points before the token; returns it behind the token.
    fn push(&mut self, text: &Text, id: u32, found: Option<&TokenLogprob>, at: u64) -> u64 {
        let shown = |id: u32| String::from_utf8_lossy(&text.tokenizer.token_bytes(id)).into_owned();
        let token = shown(id);
        let behind = at + token.chars().count() as u64;
        self.tokens.push(token);
        self.token_logprobs.push(found.map(|f| f.logprob));
        let top = found.map(|f| f.top.iter().map(|(id, logprob)| (shown(*id), (*logprob).into())).collect());
        self.top_logprobs.push(top);
        self.text_offset.push(at);
        behind
    }
}

/// Completes prompts.
#[utoipa::path(post, path = "/v1/completions", operation_id = "createCompletion", tag = "chat",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The completions; with `stream`, server-sent events that end with [DONE]",
            body = Completion),
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
    JsonObject(mut body): JsonObject,
) -> Result<Response, ApiError> {
    refuse_unsupported(&mut body, &UNSUPPORTED)?;
    let request: CompletionRequest = read(body)?;
    let (generations, answer) = start(&state, &project, &request).await?;
    let pieces = side_by_side(generations);
    if request.stream.unwrap_or(false) {
        let with_usage = request.stream_options.is_some_and(|options| options.include_usage.unwrap_or(false));
        return Ok(answer.stream(pieces, with_usage));
    }
    Ok(Json(answer.collect(pieces).await?).into_response())
}

fn prompts(model: &Model, prompt: &Prompt) -> Result<Vec<Vec<u32>>, Problem> {
    let tokenizer = &model.resident.text.tokenizer;
    let ids = |text: &String| -> Result<Vec<u32>, Problem> {
        let ids = tokenizer.encode(text, true)?;
        Ok(tokenizer.bos.into_iter().filter(|bos| ids.first() != Some(bos)).chain(ids.iter().copied()).collect())
    };
    let prompts = match prompt {
        Prompt::Text(text) => vec![ids(text)?],
        Prompt::Texts(texts) => texts.iter().take(MAX_PROMPTS + 1).map(ids).collect::<Result<_, _>>()?,
        Prompt::Ids(ids) => vec![ids.clone()],
        Prompt::ManyIds(many) => many.iter().take(MAX_PROMPTS + 1).cloned().collect(),
    };
    if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
        let message = format!("prompt has no or more than {MAX_PROMPTS} prompts");
        return Err(Problem::invalid("prompt", "out_of_range", message));
    }
    Ok(prompts)
}

async fn start(
    state: &AppState,
    project: &str,
    request: &CompletionRequest,
) -> Result<(Vec<Generation>, Answer), Problem> {
    let n = in_range("n", request.n.unwrap_or(1), 1, MAX_N)?;
    if request.stream_options.is_some() && request.stream != Some(true) {
        return Err(Problem::invalid("stream_options", "invalid_combination", "stream_options needs stream"));
    }
    let logprobs = request.logprobs.map(|top| in_range("logprobs", top, 0, 20)).transpose()?.map(|n| n as usize);
    let echo = request.echo.unwrap_or(false);
    if request.max_tokens == Some(0) && !echo {
        return Err(Problem::invalid("max_tokens", "out_of_range", "max_tokens is 0, which needs echo"));
    }
    let model = state.service.model(project, &request.model).await?;
    let fields = SamplingFields {
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        repetition_penalty: request.repetition_penalty,
        presence_penalty: request.presence_penalty,
        frequency_penalty: request.frequency_penalty,
        logit_bias: request.logit_bias.clone(),
        seed: request.seed,
        ignore_eos: request.ignore_eos,
        stop: request.stop.clone(),
    };
    let mut generations = Vec::new();
    for prompt in prompts(&model, &request.prompt)? {
        for _ in 0..n {
            generations.push(state.service.generate(Wanted {
                model: &model,
                project,
                prompt: prompt.clone(),
                max_tokens: Some(request.max_tokens.unwrap_or(16)),
                max_tokens_param: "max_tokens",
                prompt_param: "prompt",
                fields: &fields,
                logprobs,
                prompt_logprobs: logprobs.filter(|_| echo),
                index: generations.len() as u64,
            })?);
        }
    }
    let fingerprint = model.adapter.as_ref().map_or(&model.resident.base.info.hash, |a| &a.generation).clone();
    let answer = Answer {
        id: id::new("cmpl-"),
        model: model.name,
        fingerprint,
        text: model.resident.text,
        // A prompt counts once, however many completions it has.
        prompt_tokens: generations.iter().step_by(n as usize).map(|g| g.prompt.len() as u64).sum(),
        prompts: generations.iter().map(|g| g.prompt.clone()).collect(),
        echo,
        with_logprobs: logprobs.is_some(),
    };
    Ok((generations, answer))
}

struct Answer {
    id: String,
    model: String,
    fingerprint: String,
    text: std::sync::Arc<Text>,
    prompt_tokens: u64,
    prompts: Vec<Vec<u32>>,
    echo: bool,
    with_logprobs: bool,
}

impl Answer {
    fn envelope(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion".to_owned(),
            created: now(),
            model: self.model.clone(),
            system_fingerprint: self.fingerprint.clone(),
            choices,
            usage,
        }
    }

    /// The choice that a piece makes; `at` is the length of the choice's text so far, in code points of its tokens.
    fn choice(&self, index: u64, piece: Piece, at: &mut u64) -> CompletionChoice {
        let mut logprobs = self.with_logprobs.then(CompletionLogprobs::default);
        let (mut text, mut reason) = (String::new(), None);
        match piece {
            Piece::Prompt(found) => {
                for (id, found) in self.prompts[index as usize].iter().zip(&found) {
                    if let Some(logprobs) = &mut logprobs {
                        *at = logprobs.push(&self.text, *id, found.as_ref(), *at);
                    }
                }
            }
            Piece::Text { text: piece, token } => {
                if let (Some(logprobs), Some((id, found))) = (&mut logprobs, token) {
                    *at = logprobs.push(&self.text, id, found.as_ref(), *at);
                }
                text = piece;
            }
            Piece::End { text: piece, reason: why } => (text, reason) = (piece, Some(why.to_owned())),
        }
        CompletionChoice { index, text, logprobs, finish_reason: reason }
    }

    /// The prompt as text, special tokens included.
    fn echoed(&self, index: u64) -> Result<String, Problem> {
        if !self.echo {
            return Ok(String::new());
        }
        Ok(self.text.tokenizer.decode(&self.prompts[index as usize], false)?)
    }

    async fn collect(&self, mut pieces: Pieces) -> Result<Completion, Problem> {
        let mut choices = Vec::new();
        for index in 0..self.prompts.len() as u64 {
            let logprobs = self.with_logprobs.then(CompletionLogprobs::default);
            choices.push(CompletionChoice { index, text: self.echoed(index)?, logprobs, finish_reason: None });
        }
        let (mut counts, mut places) = (vec![0; choices.len()], vec![0; choices.len()]);
        while let Some((index, piece, tokens)) = pieces.recv().await {
            let i = index as usize;
            counts[i] = tokens;
            let part = self.choice(index, piece?, &mut places[i]);
            choices[i].text.push_str(&part.text);
            choices[i].finish_reason = part.finish_reason;
            if let (Some(all), Some(new)) = (&mut choices[i].logprobs, part.logprobs) {
                all.tokens.extend(new.tokens);
                all.token_logprobs.extend(new.token_logprobs);
                all.top_logprobs.extend(new.top_logprobs);
                all.text_offset.extend(new.text_offset);
            }
        }
        Ok(self.envelope(choices, Some(Usage::new(self.prompt_tokens, counts.iter().sum()))))
    }

    fn stream(self, mut pieces: Pieces, with_usage: bool) -> Response {
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(async move {
            let n = self.prompts.len();
            let (mut counts, mut places) = (vec![0; n], vec![0; n]);
            for index in 0..n as u64 {
                let first = match self.echoed(index) {
                    Ok(text) if text.is_empty() => continue,
                    Ok(text) => {
                        let choice = CompletionChoice { index, text, logprobs: None, finish_reason: None };
                        Ok(self.envelope(vec![choice], None))
                    }
                    Err(problem) => Err(problem),
                };
                if sender.send(first).await.is_err() {
                    return;
                }
            }
            while let Some((index, piece, tokens)) = pieces.recv().await {
                let i = index as usize;
                counts[i] = tokens;
                let chunk = piece.map(|piece| self.choice(index, piece, &mut places[i]));
                let is_empty = |c: &CompletionChoice| {
                    c.text.is_empty()
                        && c.finish_reason.is_none()
                        && c.logprobs.as_ref().is_none_or(|l| l.tokens.is_empty())
                };
                if chunk.as_ref().is_ok_and(is_empty) {
                    continue;
                }
                let failed = chunk.is_err();
                let sent = sender.send(chunk.map(|choice| self.envelope(vec![choice], None))).await;
                if sent.is_err() || failed {
                    return;
                }
            }
            if with_usage {
                let usage = Usage::new(self.prompt_tokens, counts.iter().sum());
                _ = sender.send(Ok(self.envelope(Vec::new(), Some(usage)))).await;
            }
        });
        respond(receiver)
    }
}
