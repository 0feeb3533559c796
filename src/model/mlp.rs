//! The gated feed-forward block.

use candle_core::{Result, Tensor};

use super::{
    Linear,
    ops::{self, Activation},
};

/// `down(act(gate(x)) ⊙ up(x))`
#[derive(Clone)]
pub struct Mlp {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
    pub activation: Activation,
}

/// A block's products with its input, and their gated activation; of some rows or all.
pub struct Products {
    pub gate: Tensor,
    pub up: Tensor,
    pub z: Tensor,
}

impl Mlp {
    /// `act(gate) ⊙ up` of two products of this block.
    pub fn activate(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        ops::gated(self.activation, gate, up)
    }
}
