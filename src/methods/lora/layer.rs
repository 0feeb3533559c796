//! LoRA's arithmetic (Hu et al., arXiv 2106.09685).
//!
//! `y = base(x) + s · (drop(x) Aᵀ) Bᵀ` with `A: (r, in)`, `B: (out, r)`, `s = alpha/r` (or `alpha/√r`, rsLoRA).
//! Dropout acts on the adapter's input only, for each linear by itself, and only while training.

use candle_core::{Result, Tensor};

use crate::{
    domain::Site,
    methods::dropout,
    model::{At, Hook, Linear, ops},
};

/// One linear's change.
#[derive(Clone)]
pub struct LowRank {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
}

impl LowRank {
    /// `y + s · (x Aᵀ) Bᵀ`; x: (rows, in), y: (rows, out)
    fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        y + ops::low_rank_delta(x, &self.a, &self.b, self.scale as f32)?
    }
}

/// The adapter as the model sees it. While training, its tensors share their memory with the variables.
pub struct Lora {
    /// `[layer][site]`
    layers: Vec<[Option<LowRank>; Site::LAYER.len()]>,
    dropout: f64,
}

impl Lora {
    pub fn new(layers: usize, dropout: f64) -> Self {
        Self { layers: vec![Default::default(); layers], dropout }
    }

    pub fn insert(&mut self, layer: usize, site: Site, change: LowRank) {
        if let Some(slot) = self.layers.get_mut(layer).and_then(|sites| sites.get_mut(site as usize)) {
            *slot = Some(change);
        }
    }

    fn get(&self, at: At, site: Site) -> Option<&LowRank> {
        self.layers.get(at.layer)?.get(site as usize)?.as_ref()
    }

    /// x with dropout; none where there is nothing to drop.
    fn dropped(&self, at: At, site: Site, x: &Tensor) -> Result<Option<Tensor>> {
        dropout(x, self.dropout, at.train, (at.layer * Site::LAYER.len() + site as usize) as u64)
    }
}

impl Hook for Lora {
    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        let Some(change) = self.get(at, site) else { return base.forward(x) };
        match self.dropped(at, site, x)? {
            None => base.forward_low_rank(x, &change.a, &change.b, change.scale),
            Some(dropped) => change.add(&dropped, &base.forward(x)?),
        }
    }

    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, _base: &Linear) -> Result<Tensor> {
        let Some(change) = self.get(at, site) else { return Ok(y) };
        match self.dropped(at, site, x)? {
            None => change.add(x, &y),
            Some(dropped) => change.add(&dropped, &y),
        }
    }
}
