//! MixLoRA while it is served: its tensors as numbers, for ops over all adapters of a batch.

use candle_core::{Result, Tensor};

use super::{experts::Experts, mixlora::Block, top_k::TopK};
use crate::{
    domain::Site,
    methods::lora::layer::{Adapted, LowRank},
    model::{self, Base, Served, served::Mixture},
};

pub fn of(blocks: &[Option<Block>], attention: &Adapted<LowRank>, top_k: usize, base: &Base) -> Result<Served> {
    let Some(mut served) = attention.served(base)? else {
        candle_core::bail!("attention's changes are of linears of the layers alone");
    };
    for (layer, block) in blocks.iter().enumerate() {
        let Some(block) = block else { continue };
        let experts = |site: Site, experts: &Option<Experts>| -> Result<Vec<model::LowRank>> {
            let Some(Experts { pairs, scale }) = experts else { return Ok(Vec::new()) };
            let change = |(a, b): &(Tensor, Tensor)| LowRank { a: a.clone(), b: b.clone(), scale: *scale };
            pairs.iter().map(|pair| change(pair).served(base.linear(layer, site))).collect()
        };
        served.layer(layer).mixture = Some(Mixture {
            router: block.router.weight.flatten_all()?.to_vec1()?,
            choose: Box::new(move |p| TopK(top_k).weights(p)),
            gate: experts(Site::Gate, &block.gate)?,
            up: experts(Site::Up, &block.up)?,
            down: experts(Site::Down, &block.down)?,
        });
    }
    Ok(served)
}
