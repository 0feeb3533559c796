//! A small trained linear with a bias.

use candle_core::{Result, Tensor};

use super::part::{Init, Part, Tensors};
use crate::model::ops::trained_linear;

/// `x Wᵀ + b`, `W: (out, in)`
pub struct Affine {
    pub weight: Tensor,
    pub bias: Tensor,
}

impl Affine {
    /// `NAME.weight` and `NAME.bias`
    pub fn parts(name: &str, [outputs, inputs]: [usize; 2], weight: Init, bias: Init) -> [Part; 2] {
        [
            Part::new(format!("{name}.weight"), [outputs, inputs], weight),
            Part::new(format!("{name}.bias"), [outputs], bias),
        ]
    }

    pub fn of(tensors: &Tensors, name: &str) -> Result<Self> {
        Ok(Self { weight: tensors.get(&format!("{name}.weight"))?, bias: tensors.get(&format!("{name}.bias"))? })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        trained_linear(x, &self.weight)?.broadcast_add(&self.bias.to_device(x.device())?)
    }
}
