//! UniPELT while it is served: its tensors as numbers, for ops over all adapters of a batch.

use candle_core::{Result, Tensor};

use super::{
    Modules,
    layer::{GatedLora, Layer},
};
use crate::{
    domain::Site,
    methods::affine::Affine,
    model::{
        Base, Hook, LowRank, Served,
        served::{self, Bottleneck, Gate},
    },
};

pub struct ServedUnipelt {
    served: Served,
    prefixes: Vec<(Tensor, Tensor)>,
    length: usize,
}

impl Hook for ServedUnipelt {
    fn served(&self) -> Option<&Served> {
        Some(&self.served)
    }

    fn prefix(&self, layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        Ok(self.prefixes.get(layer).cloned())
    }

    fn prefix_len(&self) -> usize {
        self.length
    }

    fn shifts_positions(&self) -> bool {
        false
    }
}

pub fn of(modules: &Modules, base: &Base) -> Result<ServedUnipelt> {
    let mut served = Served::new(modules.layers.len());
    for (i, layer) in modules.layers.iter().enumerate() {
        served.insert(i, Site::Q, lora(&layer.q, base, i, Site::Q)?);
        served.insert(i, Site::V, lora(&layer.v, base, i, Site::V)?);
        let place = served.layer(i);
        place.gate = Some(gate(&layer.prefix_gate)?);
        place.bottleneck = Some(bottleneck(layer, base, i)?);
    }
    let length = modules.encoder.embedding.dim(0)?;
    Ok(ServedUnipelt { served, prefixes: modules.encoder.prefixes(modules.layers.len())?, length })
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

fn lora(lora: &GatedLora, base: &Base, layer: usize, site: Site) -> Result<LowRank> {
    Ok(base.linear(layer, site).low_rank(numbers(&lora.a)?, &numbers(&lora.b)?, 1.0).gated(gate(&lora.gate)?))
}

fn gate(affine: &Affine) -> Result<Gate> {
    Ok(Gate { weight: numbers(&affine.weight)?, bias: affine.bias.flatten_all()?.get(0)?.to_scalar()? })
}

fn bottleneck(layer: &Layer, base: &Base, i: usize) -> Result<Bottleneck> {
    let affine = |affine: &Affine| -> Result<served::Affine> {
        Ok(served::Affine { weight: numbers(&affine.weight)?, bias: numbers(&affine.bias)? })
    };
    let (down, up, gate) = (affine(&layer.down)?, affine(&layer.up)?, gate(&layer.bottleneck_gate)?);
    Ok(Bottleneck::new(down, up, gate, base.linear(i, Site::Down).compute()))
}
