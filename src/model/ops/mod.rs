//! Fused ops over the kernels, each with a hand-written backward.
//!
//! All activations are f32 token rows `(rows, width)`. A [`graph`] hands gradients from op to op and
//! keeps what a backward needs. Frozen weights are captured, never inputs: they take no gradient.
//!
//! On other devices than the CPU every op is the one of the same name in [`composed`].

mod attention;
pub mod composed;
mod cross_entropy;
mod dropout;
mod elementwise;
mod graph;
mod grouped;
mod linear;
mod log_probs;
mod low_rank;
mod rescale;
mod trained;

pub use attention::{Attention, Block, Span, attend_cached, attention};
pub use cross_entropy::{cross_entropy, dense_cross_entropy, scored_rows};
pub use dropout::dropout;
pub use elementwise::{Activation, Rotation, gated, rms_norm, rope};
pub use graph::{add, saved, seed};
pub use grouped::grouped_low_rank;
pub use linear::{frozen_linear, frozen_product};
pub use log_probs::{dense_log_probs, log_probs};
pub use low_rank::{low_rank_delta, low_rank_linear};
pub use rescale::{rescale, scale};
pub use trained::trained_linear;

use std::{
    ops::Deref,
    sync::atomic::{AtomicBool, Ordering},
};

use candle_core::{Device, Layout, Result, Shape, Storage, Tensor};

static COMPOSED: AtomicBool = AtomicBool::new(false);

/// From now on the CPU too runs [`composed`] ops: what another device runs, where it can be looked at. Slow.
pub fn compose() {
    COMPOSED.store(true, Ordering::Relaxed);
}

pub(super) fn is_composed(x: &Tensor) -> bool {
    is_composed_on(x.device())
}

pub(super) fn is_composed_on(device: &Device) -> bool {
    !device.is_cpu() || COMPOSED.load(Ordering::Relaxed)
}

/// The numbers of a contiguous f32 tensor, for as long as this is kept.
pub struct Numbers<'a, G>(G, &'a Layout);

pub fn numbers(tensor: &Tensor) -> Numbers<'_, impl Deref<Target = Storage>> {
    let (storage, layout) = tensor.storage_and_layout();
    Numbers(storage, layout)
}

impl<G: Deref<Target = Storage>> Numbers<'_, G> {
    pub fn slice(&self) -> Result<&[f32]> {
        match (&*self.0, self.1.contiguous_offsets()) {
            (Storage::Cpu(cpu), Some((start, end))) => Ok(&cpu.as_slice::<f32>()?[start..end]),
            (Storage::Cpu(_), None) => candle_core::bail!("a fused op needs contiguous rows"),
            _ => candle_core::bail!("a fused op's CPU path got a tensor of another device"),
        }
    }
}

/// Runs `f` on the numbers of contiguous f32 tensors.
pub fn with<const N: usize, R>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> Result<R>) -> Result<R> {
    let guards = tensors.map(numbers);
    let mut slices = [[].as_slice(); N];
    for (place, guard) in slices.iter_mut().zip(&guards) {
        *place = guard.slice()?;
    }
    f(slices)
}

fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

#[cfg(test)]
mod tests;
