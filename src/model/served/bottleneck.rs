//! A gated bottleneck behind the feed-forward block: with x the residual stream, m the block's output and `u = x + m`,
//! `m += σ(w·u + b) · (W_up ReLU(W_down u + b_down) + b_up)`.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::{
    factor::Factor,
    gate::Gate,
    rows::{ROWS, edit},
};
use crate::model::{
    Compute,
    kernels::{self, Mat, OutMat},
    ops,
};

/// `x Wᵀ + b`, `W: (out, in)` row by row.
pub struct Affine {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
}

pub struct Bottleneck {
    down: Factor,
    down_bias: Vec<f32>,
    /// Transposed: `(width, hidden)`.
    up: Factor,
    up_bias: Vec<f32>,
    gate: Gate,
}

impl Bottleneck {
    /// # Panics
    /// If the matrices do not fit each other; loaders check before.
    pub fn new(down: Affine, up: Affine, gate: Gate, compute: Compute) -> Self {
        let (width, hidden) = (down.bias.len(), up.bias.len());
        let fit = down.weight.len() == width * hidden && up.weight.len() == width * hidden;
        assert!(fit && gate.weight.len() == hidden, "the bottleneck's matrices do not fit");
        let turned = kernels::transpose(Mat::new(&up.weight, hidden, width));
        let (down_bias, up_bias) = (down.bias, up.bias);
        let (down, up) = (Factor::new(down.weight, width, compute), Factor::new(turned, width, compute));
        Self { down, down_bias, up, up_bias, gate }
    }

    pub fn bytes(&self) -> usize {
        let biases = size_of_val(self.down_bias.as_slice()) + size_of_val(self.up_bias.as_slice());
        self.down.bytes() + self.up.bytes() + biases + self.gate.bytes()
    }

    fn add(&self, x: Mat, m: &mut OutMat) {
        let (width, hidden) = (self.down_bias.len(), x.cols);
        let mut u = x.data[..x.rows * hidden].to_vec();
        for (i, u) in u.chunks_exact_mut(hidden).enumerate() {
            u.iter_mut().zip(m.row(i)).for_each(|(u, m)| *u += *m);
        }
        let mut v = vec![0.0; x.rows * width];
        self.down.nt(Mat::new(&u, x.rows, hidden), width, &mut OutMat::of(&mut v, x.rows, width));
        for (i, (v, u)) in v.chunks_exact_mut(width).zip(u.chunks_exact(hidden)).enumerate() {
            let gate = self.gate.of(u);
            v.iter_mut().zip(&self.down_bias).for_each(|(v, b)| *v = gate * (*v + b).max(0.0));
            m.row(i).iter_mut().zip(&self.up_bias).for_each(|(m, b)| *m += gate * b);
        }
        self.up.add_nn(&mut v, width, hidden, m);
    }
}

/// Adds each bottleneck to its own rows of `m`, which nobody else may hold. No gradients.
pub fn add(x: &Tensor, m: Tensor, bottlenecks: &[(Range<usize>, &Bottleneck)]) -> Result<Tensor> {
    let (rows, hidden) = x.dims2()?;
    if m.dims2()? != (rows, hidden) || !bottlenecks.iter().all(|(_, each)| each.up_bias.len() == hidden) {
        candle_core::bail!("bottlenecks of x ({rows}, {hidden}), m {:?}", m.shape());
    }
    ops::with([&x.contiguous()?], |[x]| {
        edit(&m, ROWS, bottlenecks, |bottleneck, rows, m| {
            bottleneck.add(Mat::new(&x[rows.start * hidden..], rows.len(), hidden), m);
        })
    })?;
    Ok(m)
}
