//! Any method's hook with a head of its own: everything but the head is the method's.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::{
    domain::{Norm, Site, TaskHead},
    model::{
        At, Hook, Linear, Replaced, Served, Taken,
        mlp::{Mlp, Products},
    },
};

pub struct Scored {
    pub inner: Arc<dyn Hook>,
    pub head: Arc<TaskHead>,
    /// `(labels, hidden)`
    pub weight: Tensor,
    /// `(labels)`
    pub bias: Option<Tensor>,
}

impl Hook for Scored {
    /// `(rows, hidden) → (rows, labels)`
    fn head(&self, x: &Tensor, _: &Linear) -> Result<Option<Tensor>> {
        let scores = x.matmul(&self.weight.to_device(x.device())?.t()?)?;
        match &self.bias {
            Some(bias) => scores.broadcast_add(&bias.to_device(x.device())?).map(Some),
            None => Ok(Some(scores)),
        }
    }

    fn task_head(&self) -> Option<&TaskHead> {
        Some(&self.head)
    }

    fn first_pass(&self) -> Option<Arc<dyn Hook>> {
        self.inner.first_pass()
    }

    fn guided(&self, hidden: &Tensor, train: Option<u64>) -> Result<Arc<dyn Hook>> {
        self.inner.guided(hidden, train)
    }

    fn virtual_tokens(&self) -> usize {
        self.inner.virtual_tokens()
    }

    fn embed(&self, ids: &[u32], is_start: bool, x: Tensor) -> Result<Tensor> {
        self.inner.embed(ids, is_start, x)
    }

    fn served(&self) -> Option<&Served> {
        self.inner.served()
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

    fn sees_ahead(&self) -> bool {
        self.inner.sees_ahead()
    }

    fn gate(&self, at: At, x: &Tensor) -> Result<Option<Tensor>> {
        self.inner.gate(at, x)
    }

    fn act(&self, at: At, z: Tensor) -> Result<Tensor> {
        self.inner.act(at, z)
    }

    fn mlp(&self, at: At, x: &Tensor, frozen: &Products, mlp: &Mlp) -> Result<Option<Replaced<'_>>> {
        self.inner.mlp(at, x, frozen, mlp)
    }

    fn after(&self, at: At, x: &Tensor, m: Tensor) -> Result<Tensor> {
        self.inner.after(at, x, m)
    }

    fn norm(&self, place: Norm) -> Option<Tensor> {
        self.inner.norm(place)
    }

    fn taken(&self) -> Option<&Taken> {
        self.inner.taken()
    }

    fn penalty(&self) -> Result<Option<Tensor>> {
        self.inner.penalty()
    }

    fn figures(&self) -> Vec<(String, f64)> {
        self.inner.figures()
    }
}
