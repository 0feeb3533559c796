//! Prompt tuning's arithmetic (Lester et al., arXiv 2104.08691; PEFT's `PromptEmbedding`).
//!
//! `X' = [Z; E(ids)]` with `Z: (P, hidden)`: trained rows stand before the token embeddings of every sequence, at the
//! positions 0 to P − 1; the text's positions start at P.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::{
    methods::virtual_tokens::file::Layout,
    model::{Hook, Served, served::NOTHING},
};

/// The rows as the model sees them.
pub struct Prompt {
    rows: Tensor,
    tokens: usize,
}

impl Prompt {
    pub fn carry(rows: &Tensor, layout: &Layout) -> Result<Arc<dyn Hook>> {
        Ok(Arc::new(Self { rows: rows.clone(), tokens: layout.tokens }))
    }
}

impl Hook for Prompt {
    fn served(&self) -> Option<&Served> {
        Some(&NOTHING)
    }

    fn virtual_tokens(&self) -> usize {
        self.tokens
    }

    fn embed(&self, _: &[u32], is_start: bool, x: Tensor) -> Result<Tensor> {
        if is_start { Tensor::cat(&[&self.rows, &x], 0) } else { Ok(x) }
    }
}
