//! Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174): the
//! forward keeps each layer's input and nothing else of it, and the backward runs the layer again when its turn comes.
//!
//! The second run is the first one's arithmetic on the same numbers, dropout's masks included, so gradients are the
//! same to the bit. What a layer shares with others is cut at its border: prefixes, and what stands before the first
//! layer, get their gradients at the end, once; the scalars that a hook takes from inside a layer for its penalty are
//! outputs of the layer as its rows are. There gradients may be added in another order than in a whole graph.

use std::iter;

use candle_core::{Result, Tensor, Var, backprop::GradStore};

use super::{
    Base, Batch, Taken,
    ops::seed,
    pass::{Pass, Prefix},
};

/// What a forward keeps for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Everything,
    LayerInputs,
}

/// The forward passes behind one loss, all over one base.
pub struct Tape {
    keep: Keep,
    passes: Vec<Recorded>,
}

struct Recorded {
    pass: Pass,
    /// Before the first layer, with its graph.
    embedded: Tensor,
    layers: Vec<Kept>,
    /// Behind the last layer: a leaf of the loss's graph.
    output: Tensor,
}

struct Kept {
    /// A leaf, a variable where anything before it is trained.
    input: Tensor,
    /// With their graph.
    prefixes: Vec<Option<Prefix>>,
    /// Of the layer's other outputs, leaves of the loss's graph.
    taken: Vec<Tensor>,
}

impl Tape {
    pub fn new(keep: Keep) -> Self {
        Self { keep, passes: Vec::new() }
    }

    /// Forgets its passes: nobody asks for their gradients.
    pub fn clear(&mut self) {
        self.passes.clear();
    }

    /// [`Base::forward`] of a batch without caches.
    pub fn forward(&mut self, base: &Base, mut batch: Batch) -> Result<Tensor> {
        if self.keep == Keep::Everything {
            return base.forward(&mut batch);
        }
        let pass = base.begin(&mut batch)?;
        if batch.sequences.iter().any(|sequence| sequence.cache.is_some()) {
            candle_core::bail!("a tape takes no batch with caches");
        }
        let embedded = pass.embed(base, &batch)?;
        let (mut x, mut layers) = (leaf(&embedded)?, Vec::with_capacity(base.layers.len()));
        for layer in 0..base.layers.len() {
            let prefixes = pass.prefixes(layer)?;
            let y = pass.layer(base, &mut batch, layer, &x, &prefixes)?;
            let taken = pass.taken().map(Taken::cut).collect::<Result<Vec<_>>>()?.concat();
            layers.push(Kept { input: std::mem::replace(&mut x, leaf(&y)?), prefixes, taken });
        }
        let hidden = base.end(&pass, &x)?;
        self.passes.push(Recorded { pass, embedded, layers, output: x });
        Ok(hidden)
    }

    /// Gives `take` the gradients of `loss`, part by part: a variable's gradient is the sum of what it sees.
    pub fn backward(self, base: &Base, loss: &Tensor, mut take: impl FnMut(&GradStore) -> Result<()>) -> Result<()> {
        let mut found = loss.backward()?;
        take(&found)?;
        self.passes.into_iter().rev().try_for_each(|pass| pass.backward(base, &mut found, &mut take))
    }
}

impl Recorded {
    /// `found` has the gradients of the leaves that stand for the layers' outputs.
    fn backward(
        mut self,
        base: &Base,
        found: &mut GradStore,
        take: &mut impl FnMut(&GradStore) -> Result<()>,
    ) -> Result<()> {
        let mut batch = Batch { sequences: Vec::new(), train: None };
        let mut gradient = found.remove(&self.output).filter(|_| self.output.is_variable());
        let mut before = Vec::new();
        for layer in (0..self.layers.len()).rev() {
            let Some(kept) = self.layers.pop() else { break };
            // None where the loss does not ask for an output, or nothing before it is trained.
            let of_outputs: Vec<Option<Tensor>> =
                iter::once(gradient.take()).chain(kept.taken.iter().map(|leaf| found.remove(leaf))).collect();
            if of_outputs.iter().all(Option::is_none) {
                continue;
            }
            let leaves = kept.prefixes.iter().map(|prefix| match prefix {
                Some((k, v)) => Ok(Some((leaf(k)?, leaf(v)?))),
                None => Ok(None),
            });
            let leaves = leaves.collect::<Result<Vec<_>>>()?;
            let y = self.pass.layer(base, &mut batch, layer, &kept.input, &leaves)?;
            let outputs = iter::once(y).chain(self.pass.taken().flat_map(Taken::take_back)).zip(of_outputs);
            let seeds = outputs.filter_map(|(output, gradient)| Some(seed(&output, gradient?)));
            let Some(root) = sum(seeds.collect::<Result<_>>()?)? else { continue };
            let mut own = root.backward()?;
            drop(root);
            take(&own)?;
            let pairs = kept.prefixes.iter().flatten().zip(leaves.iter().flatten());
            for (whole, leaf) in pairs.flat_map(|((k, v), (leaf_k, leaf_v))| [(k, leaf_k), (v, leaf_v)]) {
                if let Some(gradient) = own.remove(leaf).filter(|_| leaf.is_variable()) {
                    before.push(seed(whole, gradient)?);
                }
            }
            gradient = own.remove(&kept.input).filter(|_| kept.input.is_variable());
        }
        if let Some(gradient) = gradient.filter(|_| self.embedded.track_op()) {
            before.push(seed(&self.embedded, gradient)?);
        }
        match sum(before)? {
            Some(root) => take(&root.backward()?),
            None => Ok(()),
        }
    }
}

fn sum(seeds: Vec<Tensor>) -> Result<Option<Tensor>> {
    let mut seeds = seeds.into_iter();
    seeds.next().map(|first| seeds.try_fold(first, |sum, seed| sum + seed)).transpose()
}

/// The same numbers without what they come from; a variable if a gradient has to go on there.
pub(super) fn leaf(x: &Tensor) -> Result<Tensor> {
    if x.track_op() { Ok(Var::from_tensor(&x.detach())?.into_inner()) } else { Ok(x.clone()) }
}
