//! Prefix tuning's arithmetic (Li and Liang, arXiv 2101.00190; P-tuning v2, arXiv 2110.07602; PEFT's `PrefixEncoder`).
//!
//! Every layer's attention sees P trained keys and values before those of the text. A row of the file holds those of
//! all layers: `(P, 2·L·kv)` is `(P, 2L, kv)`, with the keys of layer ℓ in slot 2ℓ and its values in slot 2ℓ + 1.
//! The keys are used as they are, without rotation; the text's positions start at P.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::{
    methods::virtual_tokens::file::Layout,
    model::{Hook, Served, served::NOTHING},
};

/// The prefix as the model sees it.
pub struct Prefix {
    /// Keys and values `(P, kv)` of each layer.
    layers: Vec<(Tensor, Tensor)>,
    tokens: usize,
}

impl Prefix {
    pub fn carry(rows: &Tensor, layout: &Layout) -> Result<Arc<dyn Hook>> {
        let kv = layout.token_dim;
        let slot = |slot: usize| rows.narrow(1, slot * kv, kv)?.contiguous();
        let layers = (0..layout.layers).map(|layer| Ok((slot(2 * layer)?, slot(2 * layer + 1)?)));
        Ok(Arc::new(Self { layers: layers.collect::<Result<_>>()?, tokens: layout.tokens }))
    }
}

impl Hook for Prefix {
    fn served(&self) -> Option<&Served> {
        Some(&NOTHING)
    }

    fn prefix(&self, layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        Ok(self.layers.get(layer).cloned())
    }

    fn prefix_len(&self) -> usize {
        self.tokens
    }
}
