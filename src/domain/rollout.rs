//! What a run that learns from its own completions asks of the world: texts, and what they are worth.

use serde_json::Value;

/// An adapter as files: the policy as it is now.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    /// `adapter_config.json`
    pub config: &'a [u8],
    /// `adapter_model.safetensors`
    pub weights: &'a [u8],
}

/// A prompt to complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub temperature: f64,
    /// All randomness comes from it.
    pub seed: u64,
}

/// A completion, drawn from the whole distribution at its temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// With the token that ended it, if one did.
    pub ids: Vec<u32>,
    /// Ended by itself, and not by the limit.
    pub is_ended: bool,
}

/// Draws completions: the same policy and asks give the same ones.
pub trait Rollout: Sync {
    /// A completion for each ask, in their order.
    fn sample(&self, policy: Policy, asks: &[Ask]) -> anyhow::Result<Vec<Completion>>;
}

/// A completion to judge, and the row that its prompt came from.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    pub item: &'a Value,
    pub completion: &'a Completion,
}

/// Why a completion has no reward, in words: who was asked gave no answer that could be used.
#[derive(Clone, Debug, PartialEq)]
pub struct Ungraded(pub String);

/// Tells what completions are worth.
pub trait Reward: Sync {
    /// A reward for each answer, in their order. An error is the fault of the request, whatever is asked.
    fn rewards(&self, answers: &[Answer]) -> anyhow::Result<Vec<Result<f64, Ungraded>>>;
}
