//! Identity preference optimisation (Azar et al., arXiv 2310.12036, eq. 17; TRL's `dpo_trainer.py`, type `ipo`).
//!
//! `(Δ̄ − 1/(2β))²` with `Δ̄ = (ℓ_c − ℓ_c^ref)/n_c − (ℓ_r − ℓ_r^ref)/n_r`: per token, as its authors mean it.

use candle_core::Result;

use super::{
    Found, Models, Objective,
    preference::{Side, Verdict, against_reference},
};
use crate::{data::Row, domain::spec::IpoSpec};

impl Objective for IpoSpec {
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

pub fn verdict(spec: &IpoSpec, sides: [Side; 2]) -> Verdict {
    let ratios = sides.map(|side| side.log_ratio());
    let apart = ratios[0] / sides[0].tokens - ratios[1] / sides[1].tokens - 1.0 / (2.0 * spec.beta);
    Verdict {
        loss: apart * apart,
        slopes: [2.0 * apart / sides[0].tokens, -2.0 * apart / sides[1].tokens],
        rewards: ratios.map(|ratio| spec.beta * ratio),
        log_probs: sides.map(|side| side.log_prob),
    }
}
