//! Serving: one engine thread batches requests over the resident base, each row with its own adapter.

mod artifact;
mod bases;
mod engine;
mod handle;
mod registry;
mod sample;
mod sequence;

pub use artifact::{ArtifactError, CONFIG, MANIFEST, WEIGHTS, generation_of, read_adapter, sha256};
pub use bases::{Bases, Resident};
pub use handle::{EngineSettings, Handle};

/// What to generate. Checked by the caller: `prompt` is not empty, and prompt + max_tokens fit the context.
#[derive(Clone, Debug)]
pub struct Request {
    /// The base's id.
    pub base: String,
    /// The generation of the adapter, none for the base itself.
    pub generation: Option<String>,
    pub project: String,
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampling: Sampling,
    /// Ids that end the completion (they are not part of it).
    pub stop_ids: Vec<u32>,
    /// Log-probabilities of the chosen token and of this many alternatives, for each generated token.
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens (`echo`).
    pub prompt_logprobs: Option<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: usize,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
    pub ignore_eos: bool,
}

impl Default for Sampling {
    /// The whole distribution, unchanged.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            ignore_eos: false,
        }
    }
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    Stop,
    Length,
}

/// Log-probability of a token and its most likely alternatives, best first; from the distribution before truncation.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// What comes back over the channel, in this order: maybe Prompt, Tokens, then Done or Failed.
#[derive(Clone, Debug)]
pub enum Output {
    /// For each prompt token; none for the first.
    Prompt(Vec<Option<TokenLogprob>>),
    Token {
        id: u32,
        logprob: Option<TokenLogprob>,
    },
    Done(Finish),
    Failed(EngineError),
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EngineError {
    /// Too many requests wait already.
    #[error("the queue is full ({limit} requests)")]
    Full { limit: usize },
    /// The adapter's files are missing or do not fit; the reason.
    #[error("{0}")]
    Adapter(String),
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    #[error("the server is stopping")]
    Stopping,
    #[error("{0}")]
    Internal(String),
}

/// What the engine says of a loaded adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Residency {
    pub generation: String,
    pub bytes: u64,
    pub hits: u64,
}
