//! Simple preference optimisation (Meng et al., arXiv 2405.14734; TRL's `CPOConfig(loss_type="simpo", cpo_alpha=0)`).
//!
//! `−log σ(β(p̄_c − p̄_r) − γ)` with the mean log-probabilities `p̄ = ℓ/n`. No reference.

use candle_core::Result;

use super::{
    Found, Models, Objective,
    preference::{Side, Verdict, alone},
    score::{log_sigmoid, sigmoid},
};
use crate::{data::Row, domain::spec::SimpoSpec};

impl Objective for SimpoSpec {
    /// Pairs.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        vec![rows.len() as f64]
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        alone(models, rows, |sides| verdict(self, sides))
    }
}

pub fn verdict(spec: &SimpoSpec, sides: [Side; 2]) -> Verdict {
    let means = sides.map(|side| side.mean());
    let x = spec.beta * (means[0] - means[1]) - spec.gamma;
    let slope = -sigmoid(-x) * spec.beta;
    Verdict {
        loss: -log_sigmoid(x),
        slopes: [slope / sides[0].tokens, -slope / sides[1].tokens],
        rewards: means.map(|mean| spec.beta * mean),
        log_probs: means,
    }
}
