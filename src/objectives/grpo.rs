//! Group relative policy optimisation (Shao et al., arXiv 2402.03300; TRL's `grpo_trainer.py`).
//!
//! `A_i = (R_i − mean of its group) / (deviation + 1e-4)`. A token's loss, with `ρ = π/π_old` and
//! `d = log π_ref − log π`: `−min(ρA, clip(ρ, 1−ε, 1+ε)A) + β·ρ·(e^d − d − 1)`. By `loss_type` it is divided by the
//! step's tokens (dapo, arXiv 2503.14476), its completion's tokens and the completions (grpo), its micro-batch's
//! tokens (bnpo), or completions × `max_completion_length` (dr_grpo, arXiv 2503.20783).

use candle_core::Result;

use super::{
    Credit, Drawn, Found, Models, Objective, Online,
    online::{Judged, Tokens, clipped, k3, moments, pass, sampled},
};
use crate::{
    data::Row,
    domain::spec::{Draw, GrpoLoss, GrpoSpec, ScaleRewards},
};

impl Objective for GrpoSpec {
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        let tokens: usize = rows.iter().map(|row| row.trained()).sum();
        vec![match self.loss_type {
            GrpoLoss::Dapo => tokens as f64,
            GrpoLoss::Grpo | GrpoLoss::Bnpo => rows.len() as f64,
            GrpoLoss::DrGrpo => (rows.len() as u64 * self.max_completion_length) as f64,
        }]
    }

    fn has_reference(&self) -> bool {
        self.beta > 0.0 || self.max_kl.is_some()
    }

    fn online(&self) -> Option<&dyn Online> {
        Some(self)
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        let tokens: usize = sampled(rows).iter().map(|sampled| sampled.example.trained()).sum();
        let mean = rows.len() as f64 / tokens as f64;
        pass(
            models,
            rows,
            |tokens| judge(self, tokens),
            |sampled| match self.loss_type {
                GrpoLoss::Dapo | GrpoLoss::DrGrpo => 1.0,
                GrpoLoss::Grpo => 1.0 / sampled.example.trained() as f64,
                GrpoLoss::Bnpo => mean,
            },
        )
    }
}

impl Online for GrpoSpec {
    fn draw(&self) -> Draw {
        GrpoSpec::draw(self)
    }

    fn credit(&self, groups: &[Vec<Drawn>], _: f64) -> Vec<Credit> {
        let rewards: Vec<Vec<f64>> =
            groups.iter().map(|group| group.iter().map(|drawn| drawn.reward).collect()).collect();
        advantages(self, &rewards).concat().into_iter().map(Credit::from).collect()
    }

    fn max_kl(&self) -> Option<f64> {
        self.max_kl
    }

    fn kl_coef(&self) -> f64 {
        self.beta
    }
}

/// Of each group's completions.
pub fn advantages(spec: &GrpoSpec, rewards: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let (_, of_all) = moments(&rewards.concat());
    let group = |rewards: &Vec<f64>| {
        let (mean, deviation) = moments(rewards);
        let scale = match spec.scale_rewards {
            ScaleRewards::Group => deviation + 1e-4,
            ScaleRewards::Batch => of_all + 1e-4,
            ScaleRewards::None => 1.0,
        };
        rewards.iter().map(|reward| (reward - mean) / scale).collect()
    };
    rewards.iter().map(group).collect()
}

pub fn judge(spec: &GrpoSpec, tokens: Tokens) -> Judged {
    let mut many = 0;
    let token = |(i, (policy, old)): (usize, (&f64, &f64))| {
        let (mut loss, mut slope, is_clipped) = clipped(policy - old, tokens.advantage, spec.epsilon);
        many += usize::from(is_clipped);
        if let Some(reference) = tokens.reference.get(i) {
            let (ratio, d) = ((policy - old).exp(), reference - policy);
            loss += spec.beta * ratio * k3(d);
            // ∂ρ·k3 = ρ·k3 + ρ(1 − e^d) = −ρd
            slope -= spec.beta * ratio * d;
        }
        (loss, slope)
    };
    let losses: Vec<_> = tokens.policy.iter().zip(tokens.old).enumerate().map(token).collect();
    Judged { clipped: (many, losses.len()), losses }
}
