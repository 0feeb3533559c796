//! What a run will need, before it starts.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Bytes that a run holds beside the resident base, at its fullest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MemoryEstimate {
    /// The trained values.
    pub weights: u64,
    /// The optimiser's moments.
    pub optimizer: u64,
    /// Gradients of the trained values.
    pub gradients: u64,
    /// What the largest micro-batch's forward keeps for its backward.
    pub activations: u64,
    /// What single operations need for a moment, the output layer's scores among them.
    pub workspace: u64,
    /// Copies while a checkpoint is written, when gradients and activations are gone.
    pub checkpoint: u64,
    /// The rows in memory.
    pub data: u64,
    /// The most of it that is there at one time, and a tenth for the allocator.
    pub peak: u64,
    /// Settings with a smaller peak, the smallest first.
    pub savings: Vec<Saving>,
}

/// Another setting under which a run needs less memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Saving {
    /// The field of the request.
    pub param: String,
    pub value: serde_json::Value,
    /// Peak bytes with it.
    pub peak: u64,
}

/// Counts are exact; memory comes from what short passes keep.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RunEstimate {
    /// Training rows that are used, and those that are left out because they are too long or train nothing.
    pub rows: u64,
    pub left_out_rows: u64,
    /// In the used rows; where the model's own completions are learnt from, with those, each as long as it may be.
    pub tokens: u64,
    pub trained_tokens: u64,
    pub steps: u64,
    /// Tokens that go through the model in all steps: to learn from them and, for completions, to draw and weigh them.
    pub total_tokens: u64,
    pub trainable_parameters: u64,
    pub adapter_bytes: u64,
    pub memory: MemoryEstimate,
}
