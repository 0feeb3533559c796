//! The gated feed-forward block.

use super::Linear;

/// `down(act(gate(x)) ⊙ up(x))`
pub struct Mlp {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}
