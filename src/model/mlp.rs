//! The gated feed-forward block.

use candle_core::{Result, Tensor};

use super::{Linear, ops};

/// `down(silu(gate(x)) ⊙ up(x))`
pub struct Mlp {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

impl Mlp {
    /// `silu(gate) ⊙ up` of two products of this block.
    pub fn activate(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        ops::swiglu(gate, up)
    }
}
