//! `/v1/completions`: prompts as text or token ids, with `echo`.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::{
    AppState,
    auth::Inference,
    chat::Usage,
    error::{ApiError, ErrorEnvelope},
    extract::JsonObject,
    prompt::Prompt,
    request::Asked,
    stream::{Pieces, respond, side_by_side},
};
use crate::{
    domain::id,
    inference::{Resident, TokenLogprob},
    jobs::now,
    service::{
        Problem,
        fields::{Unsupported, in_range, refuse_unsupported},
        generate::{Counts, Generation, Piece, Wanted},
        mix::MixPart,
    },
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
    /// Beyond OpenAI: LoRA adapters of this base that are mixed for this request, at most 8; `model` is then the base.
    adapters: Option<Vec<MixPart>>,
    /// Default 16. 0 with `echo` scores the prompt.
    max_tokens: Option<u64>,
    /// Alternatives with each token's log-probability, 0 to 20.
    logprobs: Option<u64>,
    /// The prompt before its completion.
    echo: Option<bool>,
}

type Request = Asked<CompletionRequest>;

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

/// A place a token. Offsets count code points of the text; a token that goes on with a character has that character's.
/// A token that is no text by itself is shown by its bytes, as `bytes:\xe2\x80`.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    #[schema(value_type = Vec<Option<std::collections::HashMap<String, f32>>>)]
    pub top_logprobs: Vec<Option<IndexMap<String, f32>>>,
    pub text_offset: Vec<u64>,
}

impl CompletionLogprobs {
    /// `at` is the text's length in code points before the token; returns it behind the token.
    fn push(&mut self, resident: &Resident, id: u32, found: Option<&TokenLogprob>, at: u64) -> u64 {
        let bytes = |id: u32| resident.text.tokenizer.token_bytes(id);
        let begins = |byte: &u8| byte & 0xC0 != 0x80;
        let own = bytes(id);
        self.text_offset.push(if own.first().is_none_or(begins) { at } else { at.saturating_sub(1) });
        self.token_logprobs.push(found.map(|f| f.logprob));
        let top = |f: &TokenLogprob| f.top.iter().map(|(id, logprob)| (shown(&bytes(*id)), *logprob)).collect();
        self.top_logprobs.push(found.map(top));
        self.tokens.push(shown(&own));
        at + own.iter().filter(|byte| begins(byte)).count() as u64
    }
}

/// A token as text, or by its bytes: two different ones are never shown alike.
fn shown(bytes: &[u8]) -> String {
    let hex = || bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
    std::str::from_utf8(bytes).map_or_else(|_| format!("bytes:{}", hex()), str::to_owned)
}

/// Completes prompts.
#[utoipa::path(post, path = "/v1/completions", operation_id = "createCompletion", tag = "chat",
    request_body = Request,
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
        Some(with_usage) => Ok(answer.stream(pieces, with_usage)),
        None => Ok(Json(answer.collect(pieces).await?).into_response()),
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
    let logprobs = own.logprobs.map(|top| in_range("logprobs", top, 0, 20)).transpose()?.map(|n| n as usize);
    let echo = own.echo.unwrap_or(false);
    if own.max_tokens == Some(0) && !echo {
        return Err(Problem::invalid("max_tokens", "out_of_range", "max_tokens is 0, which needs echo"));
    }
    let model = state.service.model_of(project, &own.model, own.adapters.as_deref()).await?;
    let generations = state.service.generate(Wanted {
        model: &model,
        project,
        prompts: own.prompt.ids(&model, "prompt", MAX_PROMPTS)?,
        max_tokens: Some(own.max_tokens.unwrap_or(16)),
        max_tokens_param: "max_tokens",
        prompt_param: "prompt",
        fields: sampling,
        grammar: None,
        is_background,
        logprobs,
        prompt_logprobs: logprobs.filter(|_| echo),
    })?;
    let fingerprint = model.adapter.as_ref().map_or(&model.resident.base.info.hash, |a| &a.generation).clone();
    let answer = Answer {
        id: id::new("cmpl-"),
        model: model.name,
        fingerprint,
        resident: model.resident,
        // A prompt counts once, however many completions it has.
        prompt_tokens: generations.iter().step_by(n as usize).map(|g| g.prompt.len() as u64).sum(),
        prompts: generations.iter().map(|g| g.prompt.clone()).collect(),
        n,
        echo,
        with_logprobs: logprobs.is_some(),
    };
    Ok((generations, answer))
}

struct Answer {
    id: String,
    model: String,
    fingerprint: String,
    resident: Resident,
    prompt_tokens: u64,
    prompts: Vec<Vec<u32>>,
    n: u64,
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
                        *at = logprobs.push(&self.resident, *id, found.as_ref(), *at);
                    }
                }
            }
            Piece::Text { text: piece, token } => {
                if let (Some(logprobs), Some((id, found))) = (&mut logprobs, token) {
                    *at = logprobs.push(&self.resident, id, found.as_ref(), *at);
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
        Ok(self.resident.text.tokenizer.decode(&self.prompts[index as usize], false)?)
    }

    async fn collect(&self, mut pieces: Pieces) -> Result<Completion, Problem> {
        let mut choices = Vec::new();
        for index in 0..self.prompts.len() as u64 {
            let logprobs = self.with_logprobs.then(CompletionLogprobs::default);
            choices.push(CompletionChoice { index, text: self.echoed(index)?, logprobs, finish_reason: None });
        }
        let (mut counts, mut places) = (vec![Counts::default(); choices.len()], vec![0; choices.len()]);
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
        Ok(self.envelope(choices, Some(Usage::new(self.prompt_tokens, &counts, self.n as usize))))
    }

    fn stream(self, mut pieces: Pieces, with_usage: bool) -> Response {
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(async move {
            let n = self.prompts.len();
            let (mut counts, mut places) = (vec![Counts::default(); n], vec![0; n]);
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
                let usage = Usage::new(self.prompt_tokens, &counts, self.n as usize);
                _ = sender.send(Ok(self.envelope(Vec::new(), Some(usage)))).await;
            }
        });
        respond(receiver)
    }
}
