//! MixLoRA: the feed-forward block becomes a mixture of blocks that differ by low-rank changes,
//! `FFN_e(x) = down_e(silu(gate_e x) ⊙ up_e x)`, `y = Σ_{e ∈ top k} w_e · FFN_e(x)`; attention has plain LoRA.
//!
//! The frozen products do not depend on the expert, so there is one of each a row: with z the activation without
//! experts and `Σ w_e = 1`, down sees `z + Σ w_e (z_e − z)`, and each expert's own `s · B_e A_e z_e` is added. A fresh
//! adapter, whose B are zero, is the base to the bit.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{
    balance::Tally,
    experts::Experts,
    router::{Router, Routing},
};
use crate::{
    domain::Site,
    methods::{
        dropout,
        lora::layer::{Adapted, LowRank},
    },
    model::{
        At, Finish, Hook, Linear, Replaced, Taken,
        mlp::{Mlp, Products},
        ops,
    },
};

pub struct Block {
    pub router: Router,
    pub gate: Option<Experts>,
    pub up: Option<Experts>,
    pub down: Option<Experts>,
}

/// The hook of one pass.
pub struct MixLora {
    /// `[layer]`; none is the frozen block.
    pub blocks: Arc<Vec<Option<Block>>>,
    pub attention: Arc<Adapted<LowRank>>,
    pub dropout: f64,
    /// None while serving.
    pub tally: Option<Tally>,
}

impl MixLora {
    fn dropped(&self, at: At, site: Site, x: &Tensor) -> Result<Tensor> {
        let place = (at.layer * Site::LAYER.len() + site as usize) as u64;
        Ok(dropout(x, self.dropout, at.train, place)?.unwrap_or_else(|| x.clone()))
    }

    /// A frozen product's rows for each pair, with the expert's change.
    fn spread(
        &self,
        at: At,
        site: Site,
        [x, y]: [&Tensor; 2],
        experts: &Option<Experts>,
        routing: &Routing,
    ) -> Result<Tensor> {
        let y = routing.gather(y)?;
        match experts {
            None => Ok(y),
            Some(experts) => ops::add(&y, &experts.each(&routing.gather(&self.dropped(at, site, x)?)?, routing)?),
        }
    }
}

impl Hook for MixLora {
    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        self.attention.linear(at, site, x, base)
    }

    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, base: &Linear) -> Result<Tensor> {
        self.attention.adjust(at, site, x, y, base)
    }

    fn mlp(&self, at: At, x: &Tensor, frozen: &Products, mlp: &Mlp) -> Result<Option<Replaced<'_>>> {
        let Some(block) = self.blocks.get(at.layer).and_then(Option::as_ref) else { return Ok(None) };
        let routing = Routing::new(&block.router.choose(at, x, self.tally.as_ref())?)?;
        let Products { gate, up, z } = frozen;
        let gates = self.spread(at, Site::Gate, [x, gate], &block.gate, &routing)?;
        let ups = self.spread(at, Site::Up, [x, up], &block.up, &routing)?;
        let zs = mlp.activate(&gates, &ups)?;
        let z = routing.add(z, &(&zs - routing.gather(z)?)?)?;
        let finish: Finish = match &block.down {
            None => Box::new(Ok),
            Some(experts) => {
                let changes = experts.each(&self.dropped(at, Site::Down, &zs)?, &routing)?;
                Box::new(move |y| routing.add(&y, &changes))
            }
        };
        Ok(Some(Replaced { z, finish }))
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
