//! Any method's hook with a head of its own: everything but the head is the method's.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::{
    domain::{Norm, Site},
    model::{At, Hook, Linear, LowRanks, mlp::Mlp},
};

pub struct Scored {
    pub inner: Arc<dyn Hook>,
    /// `(1, hidden)`
    pub score: Tensor,
}

impl Hook for Scored {
    /// `(rows, hidden) → (rows, 1)`
    fn head(&self, x: &Tensor, _: &Linear) -> Result<Option<Tensor>> {
        x.matmul(&self.score.to_device(x.device())?.t()?).map(Some)
    }

    fn is_scorer(&self) -> bool {
        true
    }

    fn virtual_tokens(&self) -> usize {
        self.inner.virtual_tokens()
    }

    fn embed(&self, ids: &[u32], is_start: bool, x: Tensor) -> Result<Tensor> {
        self.inner.embed(ids, is_start, x)
    }

    fn low_rank(&self) -> Option<&LowRanks> {
        self.inner.low_rank()
    }

    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        self.inner.linear(at, site, x, base)
    }

    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, base: &Linear) -> Result<Tensor> {
        self.inner.adjust(at, site, x, y, base)
    }

    fn kv(&self, at: At, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        self.inner.kv(at, k, v)
    }

    fn prefix(&self, layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        self.inner.prefix(layer)
    }

    fn prefix_len(&self) -> usize {
        self.inner.prefix_len()
    }

    fn shifts_positions(&self) -> bool {
        self.inner.shifts_positions()
    }

    fn gate(&self, at: At, x: &Tensor) -> Result<Option<Tensor>> {
        self.inner.gate(at, x)
    }

    fn act(&self, at: At, z: Tensor) -> Result<Tensor> {
        self.inner.act(at, z)
    }

    fn mlp(&self, at: At, x: &Tensor, mlp: &Mlp) -> Result<Option<Tensor>> {
        self.inner.mlp(at, x, mlp)
    }

    fn after(&self, at: At, x: &Tensor, m: Tensor) -> Result<Tensor> {
        self.inner.after(at, x, m)
    }

    fn norm(&self, place: Norm) -> Option<Tensor> {
        self.inner.norm(place)
    }

    fn penalty(&self) -> Result<Option<Tensor>> {
        self.inner.penalty()
    }

    fn figures(&self) -> Vec<(String, f64)> {
        self.inner.figures()
    }
}
