//! A gate for each row: `σ(w·x + b)`.

use candle_core::{Device, Result, Tensor};

use crate::model::{
    kernels::elementwise::{dot, exp},
    ops,
};

pub struct Gate {
    pub weight: Vec<f32>,
    pub bias: f32,
}

impl Gate {
    /// # Panics
    /// If the row is shorter than the weight.
    pub fn of(&self, row: &[f32]) -> f32 {
        1.0 / (1.0 + exp(-(dot(&self.weight, row) + self.bias)))
    }

    /// Of each row, `(rows, 1)`.
    pub fn column(&self, x: &Tensor) -> Result<Tensor> {
        let (m, n) = x.dims2()?;
        if n != self.weight.len() {
            candle_core::bail!("a gate of {} numbers for rows of {n}", self.weight.len());
        }
        let gates = ops::with([&x.contiguous()?], |[x]| Ok(x.chunks_exact(n).map(|row| self.of(row)).collect()))?;
        Tensor::from_vec(gates, (m, 1), &Device::Cpu)
    }

    pub fn bytes(&self) -> usize {
        size_of_val(self.weight.as_slice())
    }
}
