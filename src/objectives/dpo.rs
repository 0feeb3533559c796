//! Direct preference optimisation (Rafailov et al., arXiv 2305.18290; TRL's `dpo_trainer.py`).
//!
//! `Δ = (ℓ_c − ℓ_c^ref) − (ℓ_r − ℓ_r^ref)`, per token for `sigmoid_norm`, with `ε = label_smoothing`:
//! - sigmoid, sigmoid_norm: `−log σ(βΔ)`
//! - robust (Chowdhury et al., arXiv 2403.00409): `(−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)) / (1−2ε)`
//! - hinge (SLiC, arXiv 2305.10425): `max(0, 1 − βΔ)`

use candle_core::Result;

use super::{
    Found, Models, Objective,
    preference::{Side, Verdict, against_reference},
    score::{log_sigmoid, sigmoid},
};
use crate::{
    data::Row,
    domain::spec::{DpoLoss, DpoSpec},
};

impl Objective for DpoSpec {
    /// Pairs.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        vec![rows.len() as f64]
    }

    fn has_reference(&self) -> bool {
        true
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        against_reference(models, rows, |sides| verdict(self, sides))
    }
}

pub fn verdict(spec: &DpoSpec, sides: [Side; 2]) -> Verdict {
    let units = match spec.loss_type {
        DpoLoss::SigmoidNorm => sides.map(|side| side.tokens),
        _ => [1.0; 2],
    };
    let ratios = sides.map(|side| side.log_ratio());
    let x = spec.beta * (ratios[0] / units[0] - ratios[1] / units[1]);
    let (loss, slope) = match spec.loss_type {
        DpoLoss::Sigmoid | DpoLoss::SigmoidNorm => (-log_sigmoid(x), -sigmoid(-x)),
        DpoLoss::Robust => {
            let noise = spec.label_smoothing;
            let share = 1.0 - 2.0 * noise;
            let loss = (-(1.0 - noise) * log_sigmoid(x) + noise * log_sigmoid(-x)) / share;
            (loss, (-(1.0 - noise) * sigmoid(-x) - noise * sigmoid(x)) / share)
        }
        DpoLoss::Hinge => ((1.0 - x).max(0.0), if x < 1.0 { -1.0 } else { 0.0 }),
    };
    Verdict {
        loss,
        slopes: [slope * spec.beta / units[0], -slope * spec.beta / units[1]],
        rewards: ratios.map(|ratio| spec.beta * ratio),
        log_probs: sides.map(|side| side.log_prob),
    }
}
