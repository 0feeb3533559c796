//! Text from the engine: ids in, pieces of text out, with stop strings and counts.

use serde::Deserialize;
use tokio::sync::mpsc;

use super::{Problem, Service, catalogue::Model, fields::in_range, stop::StopMatcher};
use crate::{
    domain::id,
    inference::{AdapterRef, Finish, Output, Request, Resident, Sampling, TokenLogprob},
    text::Detokenizer,
};

/// Completions of one request.
pub const MAX_N: u64 = 16;

/// `"stop": "x"` or a list of up to four.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    One(String),
    Many(Vec<String>),
}

/// Sampling fields that chat and completions share, checked.
#[derive(Clone, Debug, Default)]
pub struct SamplingFields {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Option<serde_json::Map<String, serde_json::Value>>,
    pub seed: Option<i64>,
    pub ignore_eos: Option<bool>,
    pub stop: Option<Stop>,
}

impl SamplingFields {
    fn sampling(&self, vocab: usize) -> Result<Sampling, Problem> {
        let top_k = in_range("top_k", self.top_k.unwrap_or(-1), -1, i64::from(u32::MAX))?;
        let mut bias = Vec::new();
        for (token, value) in self.logit_bias.iter().flatten() {
            let param = format!("logit_bias.{token}");
            let id: Option<u32> = token.parse().ok().filter(|id| (*id as usize) < vocab);
            let wrong = |why: &str| Problem::invalid(&param, "out_of_range", format!("{param}: {why}"));
            let id = id.ok_or_else(|| wrong(&format!("not a token id below {vocab}")))?;
            let value = value.as_f64().ok_or_else(|| wrong("not a number"))?;
            bias.push((id, in_range(&param, value, -100.0, 100.0)? as f32));
        }
        let number = |param: &str, value: Option<f32>, default: f32, least: f32, most: f32| {
            in_range(param, value.unwrap_or(default), least, most)
        };
        Ok(Sampling {
            temperature: number("temperature", self.temperature, 1.0, 0.0, 2.0)?,
            top_p: number("top_p", self.top_p, 1.0, f32::MIN_POSITIVE, 1.0)?,
            top_k: usize::try_from(top_k).unwrap_or(0),
            min_p: number("min_p", self.min_p, 0.0, 0.0, 1.0)?,
            repetition_penalty: number("repetition_penalty", self.repetition_penalty, 1.0, 0.01, 10.0)?,
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            logit_bias: bias,
            seed: self.seed.map_or_else(random_seed, |seed| seed as u64),
            ignore_eos: self.ignore_eos.unwrap_or(false),
        })
    }

    fn stops(&self) -> Result<Vec<String>, Problem> {
        let stops = match self.stop.clone() {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Many(stops)) => stops,
        };
        if stops.len() > 4 || stops.iter().any(|stop| stop.is_empty() || stop.len() > 256) {
            let message = "stop takes at most 4 strings of 1 to 256 bytes";
            return Err(Problem::invalid("stop", "out_of_range", message));
        }
        Ok(stops)
    }
}

fn random_seed() -> u64 {
    id::random(8).bytes().fold(0, |seed, byte| seed << 8 | u64::from(byte))
}

/// One prompt to complete.
pub struct Wanted<'a> {
    pub model: &'a Model,
    pub project: &'a str,
    pub prompt: Vec<u32>,
    /// None takes what the context leaves.
    pub max_tokens: Option<u64>,
    /// The field that `max_tokens` came in.
    pub max_tokens_param: &'static str,
    /// The field that the prompt came in.
    pub prompt_param: &'static str,
    pub fields: &'a SamplingFields,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
    /// Which of the request's completions this is: each has its own random numbers.
    pub index: u64,
}

/// A completion under way.
pub struct Generation {
    pub index: u64,
    pub prompt: Vec<u32>,
    resident: Resident,
    outputs: mpsc::Receiver<Output>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    ended: bool,
    /// Tokens made so far: what usage counts.
    pub completion_tokens: u64,
}

/// What a generation gives, in order.
#[derive(Debug)]
pub enum Piece {
    /// Log-probabilities of the prompt's tokens; none for the first.
    Prompt(Vec<Option<TokenLogprob>>),
    /// Text that became certain, and the token that it came with.
    Text { text: String, token: Option<(u32, Option<TokenLogprob>)> },
    /// `stop` or `length`, after text that was still held back.
    End { text: String, reason: &'static str },
}

impl Service {
    /// Checks and queues a completion.
    pub fn generate(&self, wanted: Wanted) -> Result<Generation, Problem> {
        let info = &wanted.model.resident.base.info;
        let (context, prompt) = (info.context as u64, wanted.prompt.len() as u64);
        if let Some(id) = wanted.prompt.iter().find(|id| **id as usize >= info.vocab) {
            let message = format!("token id {id} is outside the vocabulary of {}", info.vocab);
            return Err(Problem::invalid(wanted.prompt_param, "out_of_range", message));
        }
        if prompt == 0 {
            return Err(Problem::invalid(wanted.prompt_param, "empty_prompt", "the prompt has no tokens"));
        }
        if prompt > context {
            let message = format!("the prompt has {prompt} tokens, above the model's context of {context}");
            return Err(Problem::invalid(wanted.prompt_param, "context_length_exceeded", message));
        }
        let max_tokens = wanted.max_tokens.unwrap_or(context - prompt);
        if max_tokens > context - prompt {
            let message = format!(
                "{} is {max_tokens} and the prompt has {prompt} tokens, together above the model's context of {context}",
                wanted.max_tokens_param
            );
            return Err(Problem::invalid(wanted.max_tokens_param, "context_length_exceeded", message));
        }
        let mut sampling = wanted.fields.sampling(info.vocab)?;
        sampling.seed = sampling.seed.wrapping_add(wanted.index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let request = Request {
            base: info.id.clone(),
            adapter: wanted.model.adapter.as_ref().map(|adapter| AdapterRef {
                generation: adapter.generation.clone(),
                bytes: u64::try_from(adapter.bytes).unwrap_or(0),
            }),
            project: wanted.project.to_owned(),
            prompt: wanted.prompt.clone(),
            max_tokens: max_tokens as usize,
            sampling,
            stop_ids: wanted.model.resident.text.stop_ids.clone(),
            logprobs: wanted.logprobs,
            prompt_logprobs: wanted.prompt_logprobs,
        };
        Ok(Generation {
            index: wanted.index,
            prompt: wanted.prompt,
            resident: wanted.model.resident.clone(),
            outputs: self.engine.submit(request)?,
            detokenizer: Detokenizer::default(),
            stop: StopMatcher::new(wanted.fields.stops()?),
            ended: false,
            completion_tokens: 0,
        })
    }
}

impl Generation {
    /// The next piece; none after the end.
    pub async fn next(&mut self) -> Result<Option<Piece>, Problem> {
        if self.ended {
            return Ok(None);
        }
        let tokenizer = &self.resident.text.tokenizer;
        match self.outputs.recv().await {
            Some(Output::Prompt(all)) => Ok(Some(Piece::Prompt(all))),
            Some(Output::Token { id, logprob }) => {
                self.completion_tokens += 1;
                let text = self.detokenizer.push(tokenizer, id)?;
                let (text, stopped) = self.stop.push(&text);
                if stopped {
                    self.ended = true;
                    // Dropping the channel's end frees the sequence.
                    self.outputs.close();
                    return Ok(Some(Piece::End { text, reason: "stop" }));
                }
                Ok(Some(Piece::Text { text, token: Some((id, logprob)) }))
            }
            Some(Output::Done(finish)) => {
                self.ended = true;
                let (mut text, mut reason) = (String::new(), if finish == Finish::Stop { "stop" } else { "length" });
                let (rest, stopped) = self.stop.push(&self.detokenizer.finish(tokenizer)?);
                text.push_str(&rest);
                if stopped {
                    reason = "stop";
                } else {
                    text.push_str(&self.stop.finish());
                }
                Ok(Some(Piece::End { text, reason }))
            }
            Some(Output::Failed(error)) => {
                self.ended = true;
                Err(error.into())
            }
            None => {
                self.ended = true;
                Err(Problem::internal("the engine ended a completion without a word"))
            }
        }
    }

    pub fn resident(&self) -> &Resident {
        &self.resident
    }
}
