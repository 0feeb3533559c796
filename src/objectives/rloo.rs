//! REINFORCE, leave one out (Ahmadian et al., arXiv 2402.14740; TRL's `rloo_trainer.py`).
//!
//! `R' = R − β·Σ(log π_old − log π_ref)`, `A_i = R'_i − mean of the others in its group`. A completion's loss, with
//! the ratio of whole texts `ρ = exp Σ(log π − log π_old)`: `−min(ρA, clip(ρ, 1−ε, 1+ε)A)`, mean over completions.

use candle_core::Result;

use super::{
    Credit, Drawn, Found, Models, Objective, Online,
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
        self.beta > 0.0 || self.max_kl.is_some()
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

    fn credit(&self, groups: &[Vec<Drawn>], kl_coef: f64) -> Vec<Credit> {
        let reward = |drawn: &Drawn| drawn.reward - kl_coef * drawn.log_ratios().sum::<f64>();
        let rewards: Vec<Vec<f64>> = groups.iter().map(|group| group.iter().map(reward).collect()).collect();
        advantages(&rewards).concat().into_iter().map(Credit::from).collect()
    }

    fn max_kl(&self) -> Option<f64> {
        self.max_kl
    }

    fn kl_coef(&self) -> f64 {
        self.beta
    }
}

/// Of each group's completions; one that is alone says nothing.
pub fn advantages(rewards: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let group = |rewards: &Vec<f64>| match rewards.len() {
        0 | 1 => vec![0.0; rewards.len()],
        n => {
            let sum: f64 = rewards.iter().sum();
            rewards.iter().map(|reward| reward - (sum - reward) / (n - 1) as f64).collect()
        }
    };
    rewards.iter().map(group).collect()
}

pub fn judge(spec: &RlooSpec, tokens: Tokens) -> Judged {
    let log_ratio: f64 = tokens.policy.iter().zip(tokens.old).map(|(new, old)| new - old).sum();
    let (loss, slope, is_clipped) = clipped(log_ratio, tokens.advantage, spec.epsilon);
    // One loss for the text; every token has its slope.
    let share = loss / tokens.policy.len().max(1) as f64;
    let losses = tokens.policy.iter().map(|_| (share, slope)).collect();
    Judged { losses, clipped: (usize::from(is_clipped), 1) }
}
