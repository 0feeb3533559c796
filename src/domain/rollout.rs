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

/// Tells what a completion is worth.
pub trait Reward: Sync {
    /// `item` is the row that the prompt came from.
    fn reward(&self, item: &Value, completion: &Completion) -> anyhow::Result<f64>;
}
