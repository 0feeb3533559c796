//! RMSNorm, gated activations and rotary positions.

use std::sync::{Arc, OnceLock};

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::{composed, graph::node, is_composed, tensor, with};
use crate::model::kernels::{by_chunks, elementwise as kernel, zeros};

/// Rows that one task takes.
const ROWS: usize = 16;

/// `y = x · w / √(mean x² + ε)` over groups of `w.len()` along the last dimension (whole rows, or heads).
pub fn rms_norm(x: &Tensor, weight: &Arc<Vec<f32>>, eps: f32) -> Result<Tensor> {
    if is_composed(x) {
        return composed::rms_norm(x, &Tensor::new(weight.as_slice(), x.device())?, eps);
    }
    let (x, weight, n) = (x.contiguous()?, weight.clone(), weight.len());
    let y = with([&x], |[x]| {
        Ok(by_chunks(x.len(), n * ROWS, |t, y| {
            for (y, x) in y.chunks_mut(n).zip(x[t * n * ROWS..].chunks(n)) {
                kernel::rms_norm(x, &weight, eps, y);
            }
        }))
    })?;
    node("rms-norm", (y, x.shape()), [&x], [&x], move |g, [x], _| {
        let dx = with([x, g], |[x, g]| {
            Ok(by_chunks(x.len(), n * ROWS, |t, dx| {
                let [x, g] = [x, g].map(|numbers| numbers[t * n * ROWS..].chunks(n));
                for ((dx, x), g) in dx.chunks_mut(n).zip(x).zip(g) {
                    kernel::rms_norm_backward(x, &weight, eps, g, dx);
                }
            }))
        })?;
        Ok([Some(tensor(dx, x.shape())?)])
    })
}

/// What a gate goes through (GLU variants, arXiv 2002.05202).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x σ(x)`: SwiGLU.
    Silu,
    /// GELU in its tanh form, `x σ(2u)` with `u = √(2/π) (x + 0.044715 x³)`: GeGLU.
    Gelu,
}

/// `act(gate) ⊙ up`
pub fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if is_composed(gate) {
        return composed::gated(activation, gate, up);
    }
    let (forward, backward): (Forward, Backward) = match activation {
        Activation::Silu => (kernel::swiglu, kernel::swiglu_backward),
        Activation::Gelu => (kernel::geglu, kernel::geglu_backward),
    };
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let z = with([&gate, &up], |[gate, up]| {
        Ok(by_chunks(gate.len(), CHUNK, |t, z| forward(&gate[t * CHUNK..], &up[t * CHUNK..], z)))
    })?;
    node("gated", (z, gate.shape()), [&gate, &up], [&gate, &up], move |dz, [gate, up], _| {
        let (mut dgate, mut dup) = (zeros(gate.elem_count()), zeros(up.elem_count()));
        with([gate, up, dz], |[gate, up, dz]| {
            let arguments = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(dz.par_chunks(CHUNK));
            let results = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
            results.zip(arguments).for_each(|((dgate, dup), ((gate, up), dz))| backward(gate, up, dz, dgate, dup));
            Ok(())
        })?;
        Ok([Some(tensor(dgate, gate.shape())?), Some(tensor(dup, up.shape())?)])
    })
}

type Forward = fn(&[f32], &[f32], &mut [f32]);
type Backward = fn(&[f32], &[f32], &[f32], &mut [f32], &mut [f32]);

/// Numbers that one task takes.
const CHUNK: usize = 8192;

/// Cosines and sines of some rows, `(rows, pairs)` each.
pub struct Rotation {
    head_dim: usize,
    pairs: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The same as tensors of a device, once somebody asked.
    tensors: OnceLock<[Tensor; 2]>,
}

impl Rotation {
    /// From each row's position and the angle per position of its pairs, as many for every row; `factor` is on
    /// cosines and sines.
    pub fn new<'a>(head_dim: usize, factor: f32, rows: impl Iterator<Item = (usize, &'a [f32])>) -> Self {
        let (mut pairs, mut cos, mut sin) = (0, Vec::new(), Vec::new());
        for (position, frequencies) in rows {
            pairs = frequencies.len();
            for f in frequencies {
                let angle = position as f32 * f;
                cos.push(angle.cos() * factor);
                sin.push(angle.sin() * factor);
            }
        }
        Self { head_dim, pairs, cos, sin, tensors: OnceLock::new() }
    }

    /// Cosines and sines as tensors, `(rows, pairs)`.
    pub(super) fn on(&self, device: &Device) -> Result<[Tensor; 2]> {
        if let Some(tensors) = self.tensors.get() {
            return Ok(tensors.clone());
        }
        let tensor = |values: &[f32]| Tensor::from_slice(values, (values.len() / self.pairs, self.pairs), device);
        let tensors = [tensor(&self.cos)?, tensor(&self.sin)?];
        Ok(self.tensors.get_or_init(|| tensors).clone())
    }

    fn rotated(&self, x: &[f32], width: usize, sign: f32) -> Vec<f32> {
        by_chunks(x.len(), width * ROWS, |t, y| {
            y.copy_from_slice(&x[t * width * ROWS..][..y.len()]);
            let [cos, sin] = [&self.cos, &self.sin].map(|of| of[t * self.pairs * ROWS..].chunks(self.pairs));
            for ((row, cos), sin) in y.chunks_mut(width).zip(cos).zip(sin) {
                for head in row.chunks_mut(self.head_dim) {
                    kernel::rotate(&mut head[..2 * self.pairs], cos, sin, sign);
                }
            }
        })
    }
}

/// Rotates every head of every row, halves against halves.
pub fn rope(x: &Tensor, rotation: &Arc<Rotation>) -> Result<Tensor> {
    if is_composed(x) {
        let [cos, sin] = rotation.on(x.device())?;
        return composed::rope(x, [&cos, &sin], rotation.head_dim);
    }
    let (x, (m, width), rotation) = (x.contiguous()?, x.dims2()?, rotation.clone());
    let y = with([&x], |[x]| Ok(rotation.rotated(x, width, 1.0)))?;
    // A rotation's gradient is the rotation back.
    node("rope", (y, (m, width)), [&x], [], move |g, [], _| {
        let dx = with([g], |[g]| Ok(rotation.rotated(g, width, -1.0)))?;
        Ok([Some(tensor(dx, (m, width))?)])
    })
}
