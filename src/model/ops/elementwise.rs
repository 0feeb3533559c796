//! RMSNorm, SwiGLU and rotary positions.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{output, slice, tensor, with};
use crate::model::kernels::elementwise as kernel;

/// Rows that one task takes.
const ROWS: usize = 16;

struct RmsNorm {
    weight: Arc<Vec<f32>>,
    eps: f32,
}

/// `y = x · w / √(mean x² + ε)` over groups of `w.len()` along the last dimension (whole rows, or heads).
pub fn rms_norm(x: &Tensor, weight: &Arc<Vec<f32>>, eps: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op1(RmsNorm { weight: weight.clone(), eps })
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, n) = (slice(storage, layout)?, self.weight.len());
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(n * ROWS).zip(x.par_chunks(n * ROWS)).for_each(|(y, x)| {
            for (y, x) in y.chunks_mut(n).zip(x.chunks(n)) {
                kernel::rms_norm(x, &self.weight, self.eps, y);
            }
        });
        output(y, layout.shape().clone())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let n = self.weight.len();
        let mut dx = vec![0.0; x.elem_count()];
        with([x, &g.contiguous()?], |[x, g]| {
            let arguments = x.par_chunks(n * ROWS).zip(g.par_chunks(n * ROWS));
            dx.par_chunks_mut(n * ROWS).zip(arguments).for_each(|(dx, (x, g))| {
                for ((dx, x), g) in dx.chunks_mut(n).zip(x.chunks(n)).zip(g.chunks(n)) {
                    kernel::rms_norm_backward(x, &self.weight, self.eps, g, dx);
                }
            });
            Ok(())
        })?;
        Ok(Some(tensor(dx, x.shape())?))
    }
}

struct SwiGlu;

/// `silu(gate) ⊙ up`
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu)
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, sg: &CpuStorage, lg: &Layout, su: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(sg, lg)?, slice(su, lu)?);
        const CHUNK: usize = 8192;
        let mut z = vec![0.0; gate.len()];
        let arguments = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK));
        z.par_chunks_mut(CHUNK).zip(arguments).for_each(|(z, (gate, up))| kernel::swiglu(gate, up, z));
        output(z, lg.shape().clone())
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, dz: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dgate, mut dup) = (vec![0.0; gate.elem_count()], vec![0.0; up.elem_count()]);
        with([gate, up, &dz.contiguous()?], |[gate, up, dz]| {
            const CHUNK: usize = 8192;
            let arguments = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(dz.par_chunks(CHUNK));
            let results = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
            results.zip(arguments).for_each(|((dgate, dup), ((gate, up), dz))| {
                kernel::swiglu_backward(gate, up, dz, dgate, dup);
            });
            Ok(())
        })?;
        Ok((Some(tensor(dgate, gate.shape())?), Some(tensor(dup, up.shape())?)))
    }
}

/// Cosines and sines by position, `(context, head_dim / 2)` each.
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// From the angle per position of each pair; angles are made in f32 as transformers makes them.
    pub fn new(frequencies: &[f32], context: usize) -> Self {
        let angles = || (0..context).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        Self { half: frequencies.len(), cos: angles().map(f32::cos).collect(), sin: angles().map(f32::sin).collect() }
    }

    fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let row = position as usize * self.half..(position as usize + 1) * self.half;
        (&self.cos[row.clone()], &self.sin[row])
    }

    fn rotate(&self, x: &mut [f32], width: usize, positions: &[u32], sign: f32) {
        x.par_chunks_mut(width * ROWS).zip(positions.par_chunks(ROWS)).for_each(|(x, positions)| {
            for (row, position) in x.chunks_mut(width).zip(positions) {
                let (cos, sin) = self.at(*position);
                for head in row.chunks_mut(2 * self.half) {
                    kernel::rotate(head, cos, sin, sign);
                }
            }
        });
    }
}

struct Rope {
    table: Arc<RopeTable>,
    positions: Arc<Vec<u32>>,
}

/// Rotates every head of every row by its position, halves against halves. Positions are inside the table.
pub fn rope(x: &Tensor, table: &Arc<RopeTable>, positions: &Arc<Vec<u32>>) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Rope { table: table.clone(), positions: positions.clone() })
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = slice(storage, layout)?.to_vec();
        self.table.rotate(&mut y, layout.shape().dims2()?.1, &self.positions, 1.0);
        output(y, layout.shape().clone())
    }

    /// A rotation's gradient is the rotation back.
    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let mut dx = with([&g.contiguous()?], |[g]| Ok(g.to_vec()))?;
        self.table.rotate(&mut dx, x.dims2()?.1, &self.positions, -1.0);
        Ok(Some(tensor(dx, x.shape())?))
    }
}
