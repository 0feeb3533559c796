//! A frozen linear layer, stored as in the file.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::{
    LowRank, ops,
    weight::{Compute, Weight},
};

/// `y = x Wᵀ (+ b)`; W is `[out, in]`. Cloning is cheap.
#[derive(Clone)]
pub struct Linear {
    weight: Arc<Weight>,
}

impl Linear {
    pub(super) fn new(weight: Arc<Weight>) -> Self {
        Self { weight }
    }

    pub(super) fn weight(&self) -> &Arc<Weight> {
        &self.weight
    }

    /// The same weights, multiplied in another way.
    pub(super) fn computing(&self, compute: Compute) -> Self {
        Self::new(Arc::new(self.weight.computing(compute)))
    }

    /// The same weights without the bias, multiplied in f32 whatever the run computes in.
    pub fn bare(&self) -> Self {
        let mut weight = self.weight.computing(Compute::F32);
        weight.bias = None;
        Self::new(Arc::new(weight))
    }

    pub fn bias(&self) -> Option<&Arc<[f32]>> {
        self.weight.bias.as_ref()
    }

    /// `‖W_o‖²` of each row, made once for a resident base.
    pub fn row_squares(&self) -> Arc<[f64]> {
        self.weight.row_squares()
    }

    /// `(out, in)`
    pub fn shape(&self) -> (usize, usize) {
        (self.weight.rows, self.weight.cols)
    }

    /// `(rows, in) → (rows, out)`. Gradient for `x` only. A row's result does not depend on the other rows.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::frozen_linear(x, &self.weight)
    }

    /// `x Wᵀ + b + scale · (x Aᵀ) Bᵀ` in one op, with gradients for `x`, `a: (r, in)` and `b: (out, r)`.
    pub fn forward_low_rank(&self, x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
        ops::low_rank_linear(x, &self.weight, a, b, scale as f32)
    }

    /// This linear's change in an adapter to serve: `a: (r, in)` and `b: (out, r)`, row by row. Beside int8 products
    /// the factors are kept in int8, a scale a row.
    pub fn low_rank(&self, a: Vec<f32>, b: &[f32], scale: f64) -> LowRank {
        LowRank::new(a, b, self.shape(), scale, self.weight.compute())
    }

    /// What its products are made in.
    pub fn compute(&self) -> Compute {
        self.weight.compute()
    }

    /// W as a dense F32 tensor.
    pub fn dequantize(&self) -> Result<Tensor> {
        let (rows, cols) = self.shape();
        let mut data = vec![0.0; rows * cols];
        self.weight.dequantize_rows(0, rows, &mut data);
        Tensor::from_vec(data, (rows, cols), &Device::Cpu)
    }
}
