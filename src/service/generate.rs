//! Text from the engine: ids in, pieces of text out, with stop strings and counts.

use std::time::Instant;

use tokio::sync::mpsc;

use super::{Problem, Service, catalogue::Model, sampling::SamplingFields, stop::StopMatcher};
use crate::{
    inference::{AdapterRef, Finish, Output, Request, Resident, Task, TokenLogprob},
    text::{Detokenizer, Grammar},
};

/// Prompts to complete.
pub struct Wanted<'a> {
    pub model: &'a Model,
    pub project: &'a str,
    pub prompts: Vec<Vec<u32>>,
    /// None takes what the context leaves.
    pub max_tokens: Option<u64>,
    /// The field that `max_tokens` came in.
    pub max_tokens_param: &'static str,
    /// The field that the prompts came in.
    pub prompt_param: &'static str,
    pub fields: &'a SamplingFields,
    /// What answers are held to.
    pub grammar: Option<Grammar>,
    /// Waits until nothing else does.
    pub is_background: bool,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
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
    pub counts: Counts,
}

/// What usage counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Tokens made so far.
    pub completion_tokens: u64,
    /// Of the prompt's tokens, those that were read already for another request.
    pub cached_tokens: u64,
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
    /// Checks and queues completions: `n` of the first prompt, then of the next.
    pub fn generate(&self, wanted: Wanted) -> Result<Vec<Generation>, Problem> {
        let resident = &wanted.model.resident;
        let sampling = wanted.fields.sampling(resident.base.info.vocab)?;
        let (n, stops) = (wanted.fields.answers()?, wanted.fields.stops()?);
        let deadline = wanted.fields.timeout()?.map(|timeout| Instant::now() + timeout);
        let mut generations = Vec::new();
        for prompt in &wanted.prompts {
            let max_tokens = room(&wanted, prompt)?;
            for _ in 0..n {
                let index = generations.len() as u64;
                let mut sampling = sampling.clone();
                sampling.seed = sampling.seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
                let request = Request {
                    base: resident.base.info.id.clone(),
                    adapter: wanted.model.adapter.as_ref().map(AdapterRef::from),
                    project: wanted.project.to_owned(),
                    prompt: prompt.clone(),
                    max_tokens: max_tokens as usize,
                    sampling,
                    stop_ids: resident.text.stop_ids.clone(),
                    logprobs: wanted.logprobs,
                    prompt_logprobs: wanted.prompt_logprobs,
                    task: Task::Complete,
                    grammar: wanted.grammar.clone(),
                    is_background: wanted.is_background,
                    deadline,
                };
                generations.push(Generation {
                    index,
                    prompt: prompt.clone(),
                    resident: resident.clone(),
                    outputs: self.submit(wanted.model, request)?,
                    detokenizer: Detokenizer::default(),
                    stop: StopMatcher::new(stops.clone()),
                    ended: false,
                    counts: Counts::default(),
                });
            }
        }
        Ok(generations)
    }
}

/// Ids of the vocabulary, at least one, and no more than the context.
pub(super) fn check_prompt(model: &Model, prompt: &[u32], param: &str) -> Result<(), Problem> {
    let info = &model.resident.base.info;
    let (context, length) = (model.longest(prompt.len()), prompt.len() as u64);
    if let Some(id) = prompt.iter().find(|id| **id as usize >= info.vocab) {
        let message = format!("token id {id} is outside the vocabulary of {}", info.vocab);
        return Err(Problem::invalid(param, "out_of_range", message));
    }
    if length == 0 {
        return Err(Problem::invalid(param, "empty_prompt", format!("the {param} has no tokens")));
    }
    if length > context {
        let message = format!("the {param} has {length} tokens, above the model's context of {context}");
        return Err(Problem::invalid(param, "context_length_exceeded", message));
    }
    Ok(())
}

/// How many tokens may follow a prompt.
fn room(wanted: &Wanted, prompt: &[u32]) -> Result<u64, Problem> {
    let (context, length) = (wanted.model.longest(prompt.len()), prompt.len() as u64);
    check_prompt(wanted.model, prompt, wanted.prompt_param)?;
    let max_tokens = wanted.max_tokens.unwrap_or(context - length);
    if max_tokens > context - length {
        let message = format!(
            "{} is {max_tokens} and the prompt has {length} tokens, together above the model's context of {context}",
            wanted.max_tokens_param
        );
        return Err(Problem::invalid(wanted.max_tokens_param, "context_length_exceeded", message));
    }
    Ok(max_tokens)
}

impl Generation {
    /// The next piece; none after the end.
    pub async fn next(&mut self) -> Result<Option<Piece>, Problem> {
        if self.ended {
            return Ok(None);
        }
        let tokenizer = &self.resident.text.tokenizer;
        let mut output = self.outputs.recv().await;
        if let Some(Output::Reused(tokens)) = output {
            self.counts.cached_tokens = tokens as u64;
            output = self.outputs.recv().await;
        }
        match output {
            Some(Output::Prompt(all)) => Ok(Some(Piece::Prompt(all))),
            Some(Output::Token { id, logprob }) => {
                self.counts.completion_tokens += 1;
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
            Some(Output::Reused(_) | Output::Scores { .. } | Output::Embedding(_)) | None => {
                self.ended = true;
                Err(Problem::internal("the engine ended a completion without a word"))
            }
        }
    }

    pub fn resident(&self) -> &Resident {
        &self.resident
    }
}
