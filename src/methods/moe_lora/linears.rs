//! MoLA, LoRAMoE and AdaMoLE: each chosen linear has a router and experts of its own,
//! `y = x Wᵀ + Σ_e w_e · s · B_e A_e drop(x)`.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{
    balance::Tally,
    experts::Experts,
    router::{Router, Routing},
};
use crate::{
    domain::Site,
    methods::dropout,
    model::{At, Hook, Linear, Taken, ops},
};

pub struct Mixed {
    pub router: Router,
    pub experts: Experts,
}

/// `[layer][site]`
pub type Sites = Vec<[Option<Mixed>; Site::LAYER.len()]>;

/// The hook of one pass.
pub struct Linears {
    pub sites: Arc<Sites>,
    pub dropout: f64,
    /// None while serving.
    pub tally: Option<Tally>,
}

impl Hook for Linears {
    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, _: &Linear) -> Result<Tensor> {
        let Some(mixed) = self.sites.get(at.layer).and_then(|sites| sites.get(site as usize)?.as_ref()) else {
            return Ok(y);
        };
        let choice = mixed.router.choose(at, x, self.tally.as_ref())?;
        let dropped = dropout(x, self.dropout, at.train, mixed.router.place)?;
        let x = dropped.as_ref().unwrap_or(x);
        if choice.active.is_none() {
            return ops::add(&y, &mixed.experts.all(x, &choice)?);
        }
        let routing = Routing::new(&choice)?;
        if routing.is_empty() {
            return Ok(y);
        }
        routing.add(&y, &mixed.experts.each(&routing.gather(x)?, &routing)?)
    }

    fn taken(&self) -> Option<&Taken> {
        self.tally.as_ref().map(Tally::balances)
    }

    fn penalty(&self) -> Result<Option<Tensor>> {
        self.tally.as_ref().map_or(Ok(None), Tally::penalty)
    }

    fn figures(&self) -> Vec<(String, f64)> {
        self.tally.as_ref().map_or_else(Vec::new, Tally::figures)
    }
}
