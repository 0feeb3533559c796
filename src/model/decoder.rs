//! The decoder of the Llama family, driven by data.

use std::{path::Path, sync::Arc};

use candle_core::{Result, Tensor};

use super::{Hook, Linear, ModelError, SequenceCache};
use crate::domain::{BaseInfo, Site};

/// A resident base. Immutable; shared by training and serving.
pub struct Base {
    pub info: BaseInfo,
}

/// Some tokens of one sequence.
pub struct Sequence<'a> {
    pub tokens: &'a [u32],
    /// The adapter that these rows carry; none is the frozen model.
    pub hook: Option<Arc<dyn Hook>>,
    /// While serving: what came before. The rows are appended to it. While training: none, the sequence starts at 0.
    pub cache: Option<&'a mut SequenceCache>,
}

/// The rows of one forward: sequences one behind another, no padding, each attending to itself only.
/// Neighbours that carry the same adapter (`Arc::ptr_eq`) are one group; put them side by side.
pub struct Batch<'a> {
    pub sequences: Vec<Sequence<'a>>,
    /// The key of this pass's random numbers while training, none otherwise (no dropout).
    pub train: Option<u64>,
}

/// One trained position: the hidden row that predicts `token`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Row of the batch, `Σ` of the lengths before it plus its place.
    pub row: usize,
    pub token: u32,
    pub weight: f32,
}

/// `loss` is a scalar with gradients (if the hidden rows carry them): `Σ weight · −log p(token)`.
pub struct CrossEntropy {
    pub loss: Tensor,
    /// Targets whose token is the argmax.
    pub correct: usize,
}

impl Base {
    /// A `.gguf` file or a directory in Hugging Face layout.
    pub fn open(id: &str, path: &Path) -> std::result::Result<Arc<Self>, ModelError> {
        let _ = (id, path);
        todo!("model")
    }

    /// Hidden states after the final norm, `(rows, hidden)`: one row per token, virtual ones left out.
    pub fn forward(&self, batch: &mut Batch) -> Result<Tensor> {
        let _ = batch;
        todo!("model")
    }

    /// Output scores of hidden rows `(n, hidden) → (n, vocab)`; all rows carry the same `hook`.
    pub fn logits(&self, hidden: &Tensor, hook: Option<&dyn Hook>) -> Result<Tensor> {
        let _ = (hidden, hook);
        todo!("model")
    }

    /// Cross entropy over some rows, in chunks: never rows × vocabulary at once. No gradient work when
    /// `hidden` does not carry one.
    pub fn cross_entropy(&self, hidden: &Tensor, targets: &[Target], hook: Option<&dyn Hook>) -> Result<CrossEntropy> {
        let _ = (hidden, targets, hook);
        todo!("model")
    }

    /// Natural log-probabilities of the targets' tokens, `(targets,)`, with gradients for `hidden`.
    pub fn log_probs(&self, hidden: &Tensor, targets: &[Target], hook: Option<&dyn Hook>) -> Result<Tensor> {
        let _ = (hidden, targets, hook);
        todo!("model")
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> SequenceCache {
        todo!("model")
    }

    /// A linear by its place.
    pub fn linear(&self, layer: usize, site: Site) -> &Linear {
        let _ = (layer, site);
        todo!("model")
    }

    /// Rows of the embedding table as F32, `(ids, hidden)`.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let _ = ids;
        todo!("model")
    }

    /// Forward passes of the decoder since start: what a test of batching counts.
    pub fn forward_count(&self) -> u64 {
        todo!("model")
    }

    /// Bytes that the weights hold in memory or map.
    pub fn bytes(&self) -> u64 {
        todo!("model")
    }
}
