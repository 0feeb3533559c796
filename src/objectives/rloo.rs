//! REINFORCE, leave one out (Ahmadian et al., arXiv 2402.14740; TRL's `rloo_trainer.py`).
//!
//! `R' = R − β·Σ(log π_old − log π_ref)`, `A_i = R'_i − mean of the others in its group`. A completion's loss, with
//! the ratio of whole texts `ρ = exp Σ(log π − log π_old)`: `−min(ρA, clip(ρ, 1−ε, 1+ε)A)`, mean over completions.

use candle_core::Result;

use super::{
    Found, Models, Objective, Online,
    online::{Judged, Tokens, clipped, pass},
};
use crate::{
    data::Row,
    domain::spec::{Draw, RlooSpec},
};

impl Objective for RlooSpec {
    /// Completions.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        vec![rows.len() as f64]
    }

    fn has_reference(&self) -> bool {
        self.beta > 0.0
    }

    fn online(&self) -> Option<&dyn Online> {
        Some(self)
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        pass(models, rows, |tokens| judge(self, tokens), |_| 1.0)
    }
}

impl Online for RlooSpec {
    fn draw(&self) -> Draw {
        RlooSpec::draw(self)
    }

    fn advantages(&self, rewards: &[Vec<f64>], divergences: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let rewards = rewards.iter().zip(divergences).map(|(rewards, divergences)| {
            rewards.iter().zip(divergences).map(|(reward, apart)| reward - self.beta * apart).collect()
        });
        advantages(&rewards.collect::<Vec<_>>())
    }
}

/// Of each group's completions.
pub fn advantages(rewards: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let group = |rewards: &Vec<f64>| {
        let (sum, others) = (rewards.iter().sum::<f64>(), (rewards.len() - 1) as f64);
        rewards.iter().map(|reward| reward - (sum - reward) / others).collect()
    };
    rewards.iter().map(group).collect()
}

pub fn judge(spec: &RlooSpec, tokens: Tokens) -> Judged {
    let log_ratio: f64 = tokens.policy.iter().zip(tokens.old).map(|(new, old)| new - old).sum();
    let (loss, slope, is_clipped) = clipped(log_ratio, tokens.advantage, spec.epsilon);
    // One loss for the text; every token has its slope.
    let share = loss / tokens.policy.len().max(1) as f64;
    let losses = tokens.policy.iter().map(|_| (share, slope)).collect();
    Judged { losses, clipped: f64::from(u8::from(is_clipped)) }
}
