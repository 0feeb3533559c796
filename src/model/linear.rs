//! A frozen linear layer, stored as in the file.

use candle_core::{Result, Tensor};

/// `y = x Wᵀ (+ b)`; W is `[out, in]`. Cloning is cheap.
#[derive(Clone)]
pub struct Linear {}

impl Linear {
    /// `(out, in)`
    pub fn shape(&self) -> (usize, usize) {
        todo!("model")
    }

    /// `(rows, in) → (rows, out)`. Gradient for `x` only. A row's result does not depend on the other rows.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let _ = x;
        todo!("model")
    }

    /// `x Wᵀ + b + scale · (x Aᵀ) Bᵀ` in one op, with gradients for `x`, `a: (r, in)` and `b: (out, r)`.
    pub fn forward_low_rank(&self, x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
        let _ = (x, a, b, scale);
        todo!("model")
    }

    /// W as a dense F32 tensor.
    pub fn dequantize(&self) -> Result<Tensor> {
        todo!("model")
    }
}
