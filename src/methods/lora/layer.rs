//! LoRA's arithmetic (Hu et al., arXiv 2106.09685), and where the methods of its family act.
//!
//! `y = base(x) + s · (drop(x) Aᵀ) Bᵀ` with `A: (r, in)`, `B: (out, r)`, `s = alpha/r` (or `alpha/√r`, rsLoRA).
//! Dropout acts on the adapter's input only, for each linear by itself, and only while training.

use candle_core::{Result, Tensor};

use crate::{
    domain::Site,
    methods::dropout,
    model::{At, Hook, Linear, ops},
};

/// What a method makes of one linear. `dropped` is x with dropout, none where nothing is dropped.
pub trait Change: Send + Sync {
    /// x: (rows, in) → (rows, out), bias included
    fn forward(&self, x: &Tensor, dropped: Option<&Tensor>, base: &Linear) -> Result<Tensor>;

    /// The same where `y = base(x)` is there already.
    fn adjust(&self, x: &Tensor, dropped: Option<&Tensor>, y: Tensor, base: &Linear) -> Result<Tensor>;
}

/// One linear's change.
#[derive(Clone)]
pub struct LowRank {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
}

impl LowRank {
    /// `s · (x Aᵀ) Bᵀ`
    pub fn delta(&self, x: &Tensor) -> Result<Tensor> {
        ops::low_rank_delta(x, &self.a, &self.b, self.scale as f32)
    }
}

impl Change for LowRank {
    fn forward(&self, x: &Tensor, dropped: Option<&Tensor>, base: &Linear) -> Result<Tensor> {
        match dropped {
            None => base.forward_low_rank(x, &self.a, &self.b, self.scale),
            Some(dropped) => base.forward(x)? + self.delta(dropped)?,
        }
    }

    fn adjust(&self, x: &Tensor, dropped: Option<&Tensor>, y: Tensor, _: &Linear) -> Result<Tensor> {
        y + self.delta(dropped.unwrap_or(x))?
    }
}

/// The adapter as the model sees it. While training, its tensors share their memory with the variables.
pub struct Adapted<C> {
    /// `[layer][site]`
    layers: Vec<[Option<C>; Site::LAYER.len()]>,
    dropout: f64,
}

impl<C: Change> Adapted<C> {
    pub fn new(layers: usize, dropout: f64) -> Self {
        Self { layers: (0..layers).map(|_| Default::default()).collect(), dropout }
    }

    pub fn insert(&mut self, layer: usize, site: Site, change: C) {
        if let Some(slot) = self.layers.get_mut(layer).and_then(|sites| sites.get_mut(site as usize)) {
            *slot = Some(change);
        }
    }

    fn get(&self, at: At, site: Site) -> Option<&C> {
        self.layers.get(at.layer)?.get(site as usize)?.as_ref()
    }

    /// x with dropout; none where there is nothing to drop.
    fn dropped(&self, at: At, site: Site, x: &Tensor) -> Result<Option<Tensor>> {
        dropout(x, self.dropout, at.train, (at.layer * Site::LAYER.len() + site as usize) as u64)
    }
}

impl<C: Change> Hook for Adapted<C> {
    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        match self.get(at, site) {
            Some(change) => change.forward(x, self.dropped(at, site, x)?.as_ref(), base),
            None => base.forward(x),
        }
    }

    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, base: &Linear) -> Result<Tensor> {
        match self.get(at, site) {
            Some(change) => change.adjust(x, self.dropped(at, site, x)?.as_ref(), y, base),
            None => Ok(y),
        }
    }
}
