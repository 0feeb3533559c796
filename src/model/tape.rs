//! Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174): the
//! forward keeps each layer's input and nothing else of it, and the backward runs the layer again when its turn comes.
//!
//! The second run is the first one's arithmetic on the same numbers, dropout's masks included, so gradients are the
//! same to the bit. What a layer shares with others is cut at its border: prefixes, and what stands before the first
//! layer, get their gradients at the end, once. A penalty that a hook takes from inside a layer reaches that layer's
//! input directly; there the two parts are added later than in a whole graph, and the last bit may differ.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, Var, backprop::GradStore};

use super::{
    Base, Batch,
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
        let pass = base.begin(&batch)?;
        if batch.sequences.iter().any(|sequence| sequence.cache.is_some()) {
            candle_core::bail!("a tape takes no batch with caches");
        }
        let embedded = pass.embed(base, &batch)?;
        let (mut x, mut layers) = (leaf(&embedded)?, Vec::with_capacity(base.layers.len()));
        for layer in 0..base.layers.len() {
            let prefixes = pass.prefixes(layer)?;
            let y = pass.layer(base, &mut batch, layer, &x, &prefixes)?;
            layers.push(Kept { input: std::mem::replace(&mut x, leaf(&y)?), prefixes });
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
    /// `found` has the gradient of the output, and what the loss took from inside the layers.
    fn backward(
        mut self,
        base: &Base,
        found: &mut GradStore,
        take: &mut impl FnMut(&GradStore) -> Result<()>,
    ) -> Result<()> {
        self.pass.again();
        let mut batch = Batch { sequences: Vec::new(), train: None };
        let mut gradient = found.remove(&self.output).filter(|_| self.output.is_variable());
        let mut before = Vec::new();
        for layer in (0..self.layers.len()).rev() {
            // None where nothing before is trained.
            let (Some(of_output), Some(kept)) = (gradient.take(), self.layers.pop()) else { break };
            let leaves = kept.prefixes.iter().map(|prefix| match prefix {
                Some((k, v)) => Ok(Some((leaf(k)?, leaf(v)?))),
                None => Ok(None),
            });
            let leaves = leaves.collect::<Result<Vec<_>>>()?;
            let y = self.pass.layer(base, &mut batch, layer, &kept.input, &leaves)?;
            let mut own = seed(&y, of_output)?.backward()?;
            drop(y);
            take(&own)?;
            let pairs = kept.prefixes.iter().flatten().zip(leaves.iter().flatten());
            for (whole, leaf) in pairs.flat_map(|((k, v), (leaf_k, leaf_v))| [(k, leaf_k), (v, leaf_v)]) {
                if let Some(gradient) = own.remove(leaf).filter(|_| leaf.is_variable()) {
                    before.push(seed(whole, gradient)?);
                }
            }
            let direct = found.remove(&kept.input);
            gradient = match (own.remove(&kept.input).filter(|_| kept.input.is_variable()), direct) {
                (Some(through), Some(direct)) => Some((through + direct)?),
                (through, _) => through,
            };
        }
        if let Some(gradient) = gradient.filter(|_| self.embedded.track_op()) {
            before.push(seed(&self.embedded, gradient)?);
        }
        let Some(first) = before.pop() else { return Ok(()) };
        let all = before.into_iter().try_fold(first, |sum, seed| sum + seed)?;
        take(&all.backward()?)
    }
}

/// The same numbers without what they come from; a variable if a gradient has to go on there.
fn leaf(x: &Tensor) -> Result<Tensor> {
    if x.track_op() { Ok(Var::from_tensor(&x.detach())?.into_inner()) } else { Ok(x.clone()) }
}

/// A scalar whose gradient for `y` is the one given.
fn seed(y: &Tensor, gradient: Tensor) -> Result<Tensor> {
    y.apply_op1(Seed(gradient))
}

struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
