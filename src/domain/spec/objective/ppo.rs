//! Proximal policy optimisation. The names are TRL's (`ppo_trainer.py` of 0.24; the controller is that of 0.11).

use serde::{Deserialize, Serialize};

use super::{
    Aim, Draw, ObjectiveCard,
    online::{MAX_UNGRADED, RATE, check_max_kl},
    real, whole,
};
use crate::domain::{SpecError, dataset::RowKind, spec::Grader};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PpoSpec {
    pub grader: Option<Grader>,
    pub max_completion_length: u64,
    pub temperature: f64,
    /// Optimiser updates on the same completions.
    pub num_ppo_epochs: u64,
    /// Share of a step's completions that may be without a reward: they are left out. A step with more fails the job.
    pub max_ungraded: f64,
    /// The weight of a token's divergence from the reference in its reward; the first one where it is controlled.
    pub kl_coef: f64,
    /// The divergence of a completion that `kl_coef` is steered towards; without one it stays as it is.
    pub kl_target: Option<f64>,
    /// Completions in which a divergence that is off by a fifth or more moves `kl_coef` by a fifth.
    pub kl_horizon: u64,
    /// The run ends at a step whose completions are further than this from the reference: their mean `log π − log π_ref`.
    pub max_kl: Option<f64>,
    pub gamma: f64,
    pub lam: f64,
    /// How far a ratio may move before its gradient ends.
    pub cliprange: f64,
    /// The same for a value.
    pub cliprange_value: f64,
    /// The value loss's weight.
    pub vf_coef: f64,
    /// The value head's learning rate as a multiple of the run's.
    pub vf_learning_rate_multiplier: f64,
    /// Scales rewards by their deviation in a step, without moving their mean.
    pub whiten_rewards: bool,
    /// Taken from the reward of a completion that the limit ended.
    pub missing_eos_penalty: Option<f64>,
}

impl Default for PpoSpec {
    fn default() -> Self {
        Self {
            grader: None,
            max_completion_length: 256,
            temperature: 1.0,
            num_ppo_epochs: 4,
            max_ungraded: MAX_UNGRADED,
            kl_coef: 0.05,
            kl_target: None,
            kl_horizon: 10_000,
            max_kl: None,
            gamma: 1.0,
            lam: 0.95,
            cliprange: 0.2,
            cliprange_value: 0.2,
            vf_coef: 0.1,
            vf_learning_rate_multiplier: 10.0,
            whiten_rewards: false,
            missing_eos_penalty: None,
        }
    }
}

impl PpoSpec {
    pub fn draw(&self) -> Draw {
        Draw {
            num_generations: 1,
            max_completion_length: self.max_completion_length,
            temperature: self.temperature,
            num_iterations: self.num_ppo_epochs,
            max_ungraded: self.max_ungraded,
        }
    }
}

impl Aim for PpoSpec {
    fn rows(&self) -> RowKind {
        RowKind::Prompts
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        self.draw().check(path, "num_ppo_epochs")?;
        let share = |field: &str, value: f64| real(path, field, value, (0.0..=1.0).contains(&value), "0 to 1");
        let weight = |field: &str, value: f64| real(path, field, value, (0.0..=100.0).contains(&value), "0 to 100");
        share("gamma", self.gamma)?;
        share("lam", self.lam)?;
        weight("kl_coef", self.kl_coef)?;
        weight("vf_coef", self.vf_coef)?;
        weight("missing_eos_penalty", self.missing_eos_penalty.unwrap_or(0.0))?;
        let clip = self.cliprange;
        real(path, "cliprange", clip, clip > 0.0 && clip < 1.0, "above 0, below 1")?;
        let above =
            |field: &str, value: f64| real(path, field, value, value > 0.0 && value <= 1000.0, "above 0, to 1000");
        above("cliprange_value", self.cliprange_value)?;
        above("vf_learning_rate_multiplier", self.vf_learning_rate_multiplier)?;
        above("kl_target", self.kl_target.unwrap_or(1.0))?;
        if self.kl_target.is_some() {
            // The controller multiplies: from 0 it would never get away.
            real(path, "kl_coef", self.kl_coef, self.kl_coef > 0.0, "above 0 with a kl_target")?;
        }
        whole(path, "kl_horizon", self.kl_horizon, 1, 1_000_000_000)?;
        check_max_kl(path, self.max_kl)
    }

    fn grader(&self) -> Option<Option<&Grader>> {
        Some(self.grader.as_ref())
    }

    fn draw(&self) -> Option<Draw> {
        Some(self.draw())
    }

    fn rate(&self) -> f64 {
        RATE
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "−min(ρA, clip(ρ, 1±ε)A) + ½·c·(V − G)² over the tokens of the model's own completions, A by \
                generalised advantage estimation with a value head, the divergence from the reference in each token's \
                reward. Schulman et al., arXiv 1707.06347; Ziegler et al., arXiv 1909.08593.",
            choose_when: "Completions are long, and which of their tokens earned the reward has to be learnt; one \
                completion of each prompt must do.",
            avoid_when: "Several completions of each prompt can be afforded: grpo and rloo need no value head.",
        }
    }
}
