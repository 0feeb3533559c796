//! Learning from rewards of the model's own completions. The names are TRL's; the grader stands beside the
//! hyperparameters, as in OpenAI's `reinforcement`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Aim, ObjectiveCard, real, whole};
use crate::domain::{SpecError, dataset::RowKind, spec::Grader};

/// With LoRA, 1e-5.
pub(super) const RATE: f64 = 0.05;

/// What completions are drawn by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Completions of each prompt.
    pub num_generations: u64,
    /// Tokens of the longest.
    pub max_completion_length: u64,
    pub temperature: f64,
    /// Optimiser updates on the same completions.
    pub num_iterations: u64,
    /// Share of a step's completions that may be without a reward.
    pub max_ungraded: f64,
}

/// Half of a step's completions may be without a reward.
pub(super) const MAX_UNGRADED: f64 = 0.5;

impl Draw {
    /// `updates` is the field that says how many updates there are.
    pub(super) fn check(&self, path: &str, updates: &str) -> Result<(), SpecError> {
        whole(path, "max_completion_length", self.max_completion_length, 1, 65_536)?;
        whole(path, updates, self.num_iterations, 1, 16)?;
        let share = self.max_ungraded;
        real(path, "max_ungraded", share, (0.0..=1.0).contains(&share), "0 to 1")?;
        let limits = "above 0, to 2";
        real(path, "temperature", self.temperature, self.temperature > 0.0 && self.temperature <= 2.0, limits)
    }
}

/// The divergence at which a run ends.
pub(super) fn check_max_kl(path: &str, max_kl: Option<f64>) -> Result<(), SpecError> {
    let most = max_kl.unwrap_or(1.0);
    real(path, "max_kl", most, most > 0.0 && most <= 1e6, "above 0, to 1000000")
}

/// What a token's loss is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GrpoLoss {
    /// The tokens of the whole step.
    #[default]
    Dapo,
    /// Its completion's tokens, then the completions.
    Grpo,
    /// The tokens of its micro-batch.
    Bnpo,
    /// Completions times `max_completion_length`.
    DrGrpo,
}

/// By what advantages are scaled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// The deviation among a prompt's completions.
    #[default]
    Group,
    /// The deviation in the whole step.
    Batch,
    None,
}

fn check_policy(path: &str, draw: Draw, beta: f64, epsilon: f64) -> Result<(), SpecError> {
    whole(path, "num_generations", draw.num_generations, 2, 64)?;
    draw.check(path, "num_iterations")?;
    real(path, "beta", beta, (0.0..=100.0).contains(&beta), "0 to 100")?;
    real(path, "epsilon", epsilon, epsilon > 0.0 && epsilon < 1.0, "above 0, below 1")
}

/// Group relative policy optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoSpec {
    pub grader: Option<Grader>,
    pub num_generations: u64,
    pub max_completion_length: u64,
    pub temperature: f64,
    pub num_iterations: u64,
    /// Share of a step's completions that may be without a reward: they are left out of their group. A step with more
    /// fails the job.
    pub max_ungraded: f64,
    /// Weight of the divergence from the reference; 0 needs none.
    pub beta: f64,
    /// How far a ratio may move before its gradient ends.
    pub epsilon: f64,
    /// The run ends at a step whose completions are further than this from the reference: their mean `log π − log π_ref`.
    pub max_kl: Option<f64>,
    pub loss_type: GrpoLoss,
    pub scale_rewards: ScaleRewards,
}

impl Default for GrpoSpec {
    fn default() -> Self {
        Self {
            grader: None,
            num_generations: 8,
            max_completion_length: 256,
            temperature: 1.0,
            num_iterations: 1,
            max_ungraded: MAX_UNGRADED,
            beta: 0.0,
            epsilon: 0.2,
            max_kl: None,
            loss_type: GrpoLoss::Dapo,
            scale_rewards: ScaleRewards::Group,
        }
    }
}

impl GrpoSpec {
    pub fn draw(&self) -> Draw {
        Draw {
            num_generations: self.num_generations,
            max_completion_length: self.max_completion_length,
            temperature: self.temperature,
            num_iterations: self.num_iterations,
            max_ungraded: self.max_ungraded,
        }
    }
}

impl Aim for GrpoSpec {
    fn rows(&self) -> RowKind {
        RowKind::Prompts
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        check_policy(path, self.draw(), self.beta, self.epsilon)?;
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
            definition: "−min(ρA, clip(ρ, 1±ε)A) + β·k3 over the tokens of the model's own completions, A a \
                completion's reward less the mean of its group. Shao et al., arXiv 2402.03300.",
            choose_when: "A grader can tell a good answer: exact answers, formats, scores.",
            avoid_when: "You have the answers themselves: learn from them, for a fraction of the work.",
        }
    }
}

/// REINFORCE, leave one out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RlooSpec {
    pub grader: Option<Grader>,
    pub num_generations: u64,
    pub max_completion_length: u64,
    pub temperature: f64,
    pub num_iterations: u64,
    /// Share of a step's completions that may be without a reward: they are left out of their group. A step with more
    /// fails the job.
    pub max_ungraded: f64,
    /// Weight of the divergence from the reference, in the reward.
    pub beta: f64,
    pub epsilon: f64,
    /// The run ends at a step whose completions are further than this from the reference: their mean `log π − log π_ref`.
    pub max_kl: Option<f64>,
}

impl Default for RlooSpec {
    fn default() -> Self {
        Self {
            grader: None,
            num_generations: 2,
            max_completion_length: 256,
            temperature: 1.0,
            num_iterations: 1,
            max_ungraded: MAX_UNGRADED,
            beta: 0.05,
            epsilon: 0.2,
            max_kl: None,
        }
    }
}

impl RlooSpec {
    pub fn draw(&self) -> Draw {
        Draw {
            num_generations: self.num_generations,
            max_completion_length: self.max_completion_length,
            temperature: self.temperature,
            num_iterations: self.num_iterations,
            max_ungraded: self.max_ungraded,
        }
    }
}

impl Aim for RlooSpec {
    fn rows(&self) -> RowKind {
        RowKind::Prompts
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        check_policy(path, self.draw(), self.beta, self.epsilon)?;
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
            definition: "−min(ρA, clip(ρ, 1±ε)A) over whole completions, A a completion's reward (less β times its \
                divergence) less the mean of the others in its group. Ahmadian et al., arXiv 2402.14740.",
            choose_when: "A grader can tell a good answer, and few completions of each prompt must do.",
            avoid_when: "Completions are long: one ratio for a whole text varies much; use grpo.",
        }
    }
}
