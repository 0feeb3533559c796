//! What adapters do inside the layers while they are served, for any number of them at once: each op takes the rows of
//! a whole batch, whatever their adapters, and a row's result does not depend on the other rows.

mod bottleneck;
mod factor;
mod gate;
mod low_rank;
mod mixture;
mod rows;

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::{
    At, Hook, Linear,
    mlp::{Mlp, Products},
};
use crate::domain::Site;
use low_rank::add_low_rank;
use mixture::Extra;
use rows::scale_rows;

pub use bottleneck::{Affine, Bottleneck};
pub use gate::Gate;
pub use low_rank::LowRank;
pub use mixture::{Choose, Mixture};

/// What an adapter does in one layer.
#[derive(Default)]
pub struct ServedLayer {
    /// `[site]`
    pub linears: [Option<LowRank>; Site::LAYER.len()],
    /// Factors of the feed-forward product before `down` (IA3).
    pub product: Option<Vec<f32>>,
    /// What the prefix counts for each row (UniPELT).
    pub gate: Option<Gate>,
    /// In place of the feed-forward block (MixLoRA).
    pub mixture: Option<Mixture>,
    /// Behind the feed-forward block (UniPELT).
    pub bottleneck: Option<Bottleneck>,
}

impl ServedLayer {
    fn bytes(&self) -> usize {
        let linears = self.linears.iter().flatten().map(LowRank::bytes).sum::<usize>();
        let product = self.product.as_ref().map_or(0, |factors| size_of_val(factors.as_slice()));
        let mixture = self.mixture.as_ref().map_or(0, Mixture::bytes);
        linears + product + mixture + self.bottleneck.as_ref().map_or(0, Bottleneck::bytes)
    }
}

/// All that an adapter does inside the layers, beside the prefix that its hook gives.
#[derive(Default)]
pub struct Served {
    layers: Vec<ServedLayer>,
}

/// Of adapters that do nothing inside the layers, or have a prefix alone there.
pub static NOTHING: Served = Served { layers: Vec::new() };

impl Served {
    pub fn new(layers: usize) -> Self {
        Self { layers: (0..layers).map(|_| ServedLayer::default()).collect() }
    }

    /// # Panics
    /// If there is no such layer; loaders check before.
    pub fn layer(&mut self, layer: usize) -> &mut ServedLayer {
        &mut self.layers[layer]
    }

    /// # Panics
    /// For the model's ends, which are no layer's; loaders check before.
    pub fn insert(&mut self, layer: usize, site: Site, change: LowRank) {
        self.layers[layer].linears[site as usize] = Some(change);
    }

    fn linear(&self, layer: usize, site: Site) -> Option<&LowRank> {
        self.layers.get(layer)?.linears.get(site as usize)?.as_ref()
    }

    fn product(&self, layer: usize) -> Option<&[f32]> {
        self.layers.get(layer)?.product.as_deref()
    }

    pub(super) fn gate(&self, layer: usize) -> Option<&Gate> {
        self.layers.get(layer)?.gate.as_ref()
    }

    /// Memory that its numbers take up.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(ServedLayer::bytes).sum()
    }
}

impl Hook for Served {
    fn served(&self) -> Option<&Served> {
        Some(self)
    }

    /// For hooks around this one, which have to be called themselves.
    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, _: &Linear) -> Result<Tensor> {
        let Some(change) = self.linear(at.layer, site) else { return Ok(y) };
        add_low_rank(x, y.copy()?, &[(0..x.dim(0)?, change)])
    }

    fn act(&self, at: At, z: Tensor) -> Result<Tensor> {
        let Some(factors) = self.product(at.layer) else { return Ok(z) };
        scale_rows(z.copy()?, &[(0..z.dim(0)?, factors)])
    }
}

/// The adapters of a pass with their rows, in order.
pub struct Crowd<'a>(Vec<(Range<usize>, &'a Served)>);

impl<'a> FromIterator<(Range<usize>, &'a Served)> for Crowd<'a> {
    fn from_iter<I: IntoIterator<Item = (Range<usize>, &'a Served)>>(adapters: I) -> Self {
        Self(adapters.into_iter().collect())
    }
}

impl<'a> Crowd<'a> {
    /// Those that have something.
    fn with<T: ?Sized>(&self, of: impl Fn(&'a Served) -> Option<&'a T>) -> Vec<(Range<usize>, &'a T)> {
        self.0.iter().filter_map(|(rows, served)| Some((rows.clone(), of(served)?))).collect()
    }

    fn in_layer<T>(&self, layer: usize, of: impl Fn(&'a ServedLayer) -> &'a Option<T>) -> Vec<(Range<usize>, &'a T)> {
        self.with(|served| of(served.layers.get(layer)?).as_ref())
    }

    /// `y` is the frozen product of `x`; nobody else may hold it, here and below.
    pub fn linear(&self, layer: usize, site: Site, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let changes = self.with(|served| served.linear(layer, site));
        if changes.is_empty() { Ok(y) } else { add_low_rank(x, y, &changes) }
    }

    /// Factors of the feed-forward product.
    pub fn product(&self, layer: usize, z: Tensor) -> Result<Tensor> {
        let factors = self.with(|served| served.product(layer));
        if factors.is_empty() { Ok(z) } else { scale_rows(z, &factors) }
    }

    /// `frozen.z` becomes what `down` takes, where a mixture stands in the block's place; none where nowhere. `h` is the
    /// block's normed input.
    pub fn mix(&self, layer: usize, mlp: &Mlp, h: &Tensor, frozen: &Products) -> Result<Option<Extra>> {
        let mixtures = self.in_layer(layer, |layer| &layer.mixture);
        if mixtures.is_empty() { Ok(None) } else { mixture::mix(h, frozen, mlp.activation, &mixtures).map(Some) }
    }

    /// `down`'s product with what mixtures add to it.
    pub fn mixed(&self, layer: usize, y: Tensor, extra: Option<Extra>) -> Result<Tensor> {
        match extra {
            None => Ok(y),
            Some(extra) => mixture::complete(y, &extra, &self.in_layer(layer, |layer| &layer.mixture)),
        }
    }

    /// The feed-forward's output `m` before it is added to the residual stream `x`.
    pub fn after(&self, layer: usize, x: &Tensor, m: Tensor) -> Result<Tensor> {
        let bottlenecks = self.in_layer(layer, |layer| &layer.bottleneck);
        if bottlenecks.is_empty() { Ok(m) } else { bottleneck::add(x, m, &bottlenecks) }
    }
}

#[cfg(test)]
mod tests;
