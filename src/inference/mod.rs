//! Serving: one engine thread batches requests over the resident base, each row with its own adapter.

mod artifact;
mod bases;
mod batch;
mod candidates;
mod disk;
mod engine;
mod fairness;
mod handle;
mod hands;
mod live;
mod mix;
mod prefixes;
mod registry;
mod reply;
mod sample;
mod sequence;
mod worth;

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use crate::{
    domain::{AdapterRecord, TaskHead, dataset::RowKind},
    text::Grammar,
};

pub use crate::methods::file::{CONFIG, WEIGHTS};
pub use artifact::{ArtifactError, MANIFEST, adapter_of, generation_of, listed, read_adapter, sha256};
pub use bases::{Bases, Resident};
pub use disk::DiskSettings;
pub use handle::{EngineSettings, Handle, Status};
pub use live::{InMemory, LiveRun, Lives, Shown};
pub use mix::Mix;
pub use registry::{Lease, Loader};

/// What to generate. Checked by the caller: `prompt` is not empty, and prompt + max_tokens fit the context that the
/// adapter's virtual tokens leave.
#[derive(Clone, Debug)]
pub struct Request {
    /// The base's id.
    pub base: String,
    /// None for the base itself.
    pub adapter: Option<AdapterRef>,
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
    pub task: Task,
    /// What the completion is held to.
    pub grammar: Option<Grammar>,
    /// Waits until nothing else does.
    pub is_background: bool,
    /// When nobody wants it any more: what has not begun to speak fails, what has ends there.
    pub deadline: Option<Instant>,
}

/// What a request wants of its prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Task {
    #[default]
    Complete,
    /// What the adapter's head says of some spans of the prompt's tokens, in order.
    Classify {
        /// What the prompt looks like; the head has to read such texts.
        rows: RowKind,
        spans: Vec<Range<usize>>,
    },
    /// Its hidden states as one vector.
    Embed(Pooling),
}

/// One vector of many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    Mean,
    Last,
}

/// An adapter in the store, or a mixture of some.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterRef {
    /// Or a mixture's name: `Mix`.
    pub generation: String,
    /// Of its files, as they were when it was published: room is made before they are read.
    pub bytes: u64,
    /// Places of the context that it takes before the text.
    pub virtual_tokens: usize,
}

impl From<&AdapterRecord> for AdapterRef {
    fn from(record: &AdapterRecord) -> Self {
        Self {
            generation: record.generation.clone(),
            bytes: u64::try_from(record.bytes).unwrap_or(0),
            virtual_tokens: usize::try_from(record.virtual_tokens).unwrap_or(0),
        }
    }
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

/// What comes back over the channel, in this order: maybe Reused, maybe Prompt, Tokens (or the Embedding), then Done or Failed.
#[derive(Clone, Debug)]
pub enum Output {
    /// So many of the prompt's tokens need not be read: others with the same adapter began with them.
    Reused(usize),
    /// For each prompt token; none for the first.
    Prompt(Vec<Option<TokenLogprob>>),
    Token {
        id: u32,
        logprob: Option<TokenLogprob>,
    },
    /// The only answer of `Task::Classify`, before `Done`: the head, and its scores of each span.
    Scores {
        head: TaskHead,
        rows: Vec<Vec<f32>>,
    },
    /// The only answer of `Task::Embed`, before `Done`.
    Embedding(Vec<f32>),
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
    /// It will never find room.
    #[error("the adapter has {bytes} bytes, above this server's limit of {limit} for all adapters in memory")]
    TooLarge { bytes: u64, limit: u64 },
    /// It would not fit with all memory to itself.
    #[error("the prompt's keys and values take {bytes} bytes, above this server's limit of {limit} for all of them")]
    Memory { bytes: usize, limit: usize },
    #[error("{0}")]
    Task(&'static str),
    #[error("the request's timeout passed before its answer began")]
    Timeout,
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// Its store is too slow, or adapters in use leave no room.
    #[error("the adapter was not in memory within {0:?}")]
    Late(Duration),
    /// Numbers that no token can be chosen by: the adapter's values are too large.
    #[error("the model's scores are not finite numbers: its adapter's weights are too large")]
    Scores,
    /// No token keeps to the grammar.
    #[error("the completion cannot keep to its format: {0}")]
    Grammar(String),
    #[error("the server is stopping")]
    Stopping,
    #[error("{0}")]
    Internal(String),
}

/// Where an adapter is, the nearest place first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    Memory,
    Disk,
    /// Nowhere nearer than where it was published.
    Store,
}

/// What the engine says of a loaded adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Residency {
    pub generation: String,
    pub bytes: u64,
    pub hits: u64,
    /// From the request for it until it could be used.
    pub load_time: Duration,
}
