//! The few things that a fine-tuning method can do to a running frozen model.
//!
//! The adapter is an argument of `forward`, not a field of a layer. Every default is the frozen model. All row
//! tensors are `(rows, width)`, f32, contiguous; rows are the tokens of the sequences of one adapter, one sequence
//! behind another, without padding.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{
    Taken,
    linear::Linear,
    mlp::{Mlp, Products},
    served::Served,
};
use crate::domain::{Norm, Site, TaskHead};

/// Where a hook is called.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    pub layer: usize,
    /// Rows of each sequence, in order; their sum is the number of rows.
    pub lengths: &'a [usize],
    /// The key of this pass's random numbers while training, none otherwise (no dropout).
    pub train: Option<u64>,
}

/// What `down` takes in a feed-forward block, and what becomes of its product.
pub struct Replaced<'a> {
    pub z: Tensor,
    pub finish: Finish<'a>,
}

pub type Finish<'a> = Box<dyn FnOnce(Tensor) -> Result<Tensor> + 'a>;

/// A fine-tuning method applied to the sequences that carry it.
pub trait Hook: Send + Sync {
    /// The hook of a pass over the same tokens that goes first, without gradients, where this one needs to see that
    /// pass's hidden rows: `guided` then makes the hook of the pass itself (X-LoRA). It puts nothing before the tokens.
    fn first_pass(&self) -> Option<Arc<dyn Hook>> {
        None
    }

    /// The hook of the pass after the first one, whose normed hidden rows these are: `(rows, hidden)`.
    fn guided(&self, hidden: &Tensor, train: Option<u64>) -> Result<Arc<dyn Hook>> {
        let _ = (hidden, train);
        candle_core::bail!("the method has no first pass")
    }

    /// How many rows `embed` puts before a sequence's tokens. Text positions start behind them.
    fn virtual_tokens(&self) -> usize {
        0
    }

    /// Token embeddings of ONE sequence, `(n, hidden)`; comes back with `virtual_tokens` rows before it when
    /// `is_start` (prompt tuning, P-tuning), or with rows replaced (trainable tokens, embedding LoRA).
    fn embed(&self, ids: &[u32], is_start: bool, x: Tensor) -> Result<Tensor> {
        let _ = (ids, is_start);
        Ok(x)
    }

    /// All that the method does inside the layers, where that can be done for all adapters of a batch in one op each. Of
    /// the other methods here only those of the model's ends and of the prefix are called then. No gradients: only for
    /// adapters that are served.
    fn served(&self) -> Option<&Served> {
        None
    }

    /// One frozen linear with the method's change: the fused way when all rows of a pass carry this adapter.
    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        self.adjust(at, site, x, base.forward(x)?, base)
    }

    /// The same where the frozen product `y` is there already, made for rows of several adapters at once.
    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, base: &Linear) -> Result<Tensor> {
        let _ = (at, site, x, base);
        Ok(y)
    }

    /// Keys and values `(rows, kv_heads · head_dim)` before RoPE (IA3).
    fn kv(&self, at: At, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let _ = at;
        Ok((k, v))
    }

    /// Keys and values `(p, kv_heads · head_dim)` that every row sees before its text; keys are not rotated
    /// (prefix tuning). The same for each sequence of this adapter.
    fn prefix(&self, layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        let _ = layer;
        Ok(None)
    }

    /// The number of rows that `prefix` gives. Text positions start behind them when `shifts_positions`.
    fn prefix_len(&self) -> usize {
        0
    }

    /// Whether text positions start behind the prefix (PEFT) or at 0 (AdapterHub, UniPELT).
    fn shifts_positions(&self) -> bool {
        true
    }

    /// Places of the context that it takes before the text.
    fn places(&self) -> usize {
        self.virtual_tokens() + if self.shifts_positions() { self.prefix_len() } else { 0 }
    }

    /// Whether a token sees those behind it: a text is then read in one pass, and what was read is no other text's.
    fn sees_ahead(&self) -> bool {
        false
    }

    /// A factor per row, `(rows, 1)`, on the prefix's keys and values as that row's query sees them (UniPELT).
    /// `x` is the attention's normed input.
    fn gate(&self, at: At, x: &Tensor) -> Result<Option<Tensor>> {
        let _ = (at, x);
        Ok(None)
    }

    /// The feed-forward product `act(gate) ⊙ up`, `(rows, intermediate)`, before `down` (IA3).
    fn act(&self, at: At, z: Tensor) -> Result<Tensor> {
        let _ = at;
        Ok(z)
    }

    /// Makes something else of the feed-forward block (MixLoRA's experts): `x` is its normed input, `frozen` are the
    /// frozen products with it, made for rows of several adapters at once.
    fn mlp(&self, at: At, x: &Tensor, frozen: &Products, mlp: &Mlp) -> Result<Option<Replaced<'_>>> {
        let _ = (at, x, frozen, mlp);
        Ok(None)
    }

    /// The feed-forward's output `m` before it is added to the residual stream `x` (UniPELT's bottleneck).
    fn after(&self, at: At, x: &Tensor, m: Tensor) -> Result<Tensor> {
        let _ = (at, x);
        Ok(m)
    }

    /// Weights `(hidden)` in place of a norm's (modules_to_save).
    fn norm(&self, place: Norm) -> Option<Tensor> {
        let _ = place;
        None
    }

    /// Replaces the output layer for these normed hidden rows: `(rows, any width)` (classification, value and reward
    /// heads, and what `head_of` makes).
    fn head(&self, x: &Tensor, base: &Linear) -> Result<Option<Tensor>> {
        match self.head_parts() {
            parts if parts.is_empty() => Ok(None),
            parts => self.head_of(&parts, x, base).map(Some),
        }
    }

    /// The tensors of an output layer over the vocabulary. Where there are some, `head_of` has to be there, and the
    /// cross entropy goes through it chunk by chunk: the scores of all rows are never there at once.
    fn head_parts(&self) -> Vec<Tensor> {
        Vec::new()
    }

    /// Scores `(rows, vocab)` of hidden rows, made of the parts or of copies of them.
    fn head_of(&self, parts: &[Tensor], x: &Tensor, base: &Linear) -> Result<Tensor> {
        let _ = (parts, x, base);
        candle_core::bail!("the method has no output layer of its own")
    }

    /// What its head says in place of the vocabulary's scores; such an adapter writes nothing.
    fn task_head(&self) -> Option<&TaskHead> {
        None
    }

    /// What `penalty` is made of, where that stems from inside the layers: nothing else of their graphs may be in it.
    fn taken(&self) -> Option<&Taken> {
        None
    }

    /// What the method adds to the loss of the pass that it went through: a mean, not a sum over tokens
    /// (AdaLoRA's orthogonality, the balance of experts).
    fn penalty(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Figures of the pass that it went through, for the step's metrics (shares of experts). Asked for before the
    /// pass's backward, which may run layers again.
    fn figures(&self) -> Vec<(String, f64)> {
        Vec::new()
    }
}

/// The frozen model itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frozen;

impl Hook for Frozen {}
