//! Fused ops over the kernels, each a candle custom op with a hand-written backward.
//!
//! All activations are f32 token rows `(rows, width)`. What a backward needs is read from the op's arguments, which
//! candle keeps anyway, or made again. Frozen weights are captured, never arguments: they take no gradient.

mod attention;
mod cross_entropy;
mod elementwise;
mod linear;
mod low_rank;
mod rescale;

pub use attention::{Attention, Span, attend_cached, attention};
pub use cross_entropy::{cross_entropy, dense_cross_entropy};
pub use elementwise::{RopeTable, rms_norm, rope, swiglu};
pub use linear::frozen_linear;
pub use low_rank::{low_rank_delta, low_rank_linear};
pub use rescale::rescale;

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, Tensor};

/// The numbers of a contiguous f32 tensor.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a fused op needs contiguous rows"),
    }
}

/// Runs `f` on the numbers of contiguous f32 tensors.
pub fn with<const N: usize, R>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> Result<R>) -> Result<R> {
    let guards = tensors.map(|t| t.storage_and_layout());
    let mut slices = [[].as_slice(); N];
    for (place, (storage, layout)) in slices.iter_mut().zip(&guards) {
        match &**storage {
            Storage::Cpu(cpu) => *place = slice(cpu, layout)?,
            _ => candle_core::bail!("a fused op's CPU path got a tensor of another device"),
        }
    }
    f(slices)
}

fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

fn output(data: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(data), shape.into()))
}

#[cfg(test)]
mod tests;
