//! Learning from what people prefer. The names are TRL's.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Aim, ObjectiveCard, real};
use crate::domain::{SpecError, dataset::RowKind};

/// Preferences are learnt a tenth as fast as demonstrations: with LoRA, 5e-6 to 5e-5 instead of 1e-4 to 5e-4.
const RATE: f64 = 0.1;

/// Which function of the margin is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    #[default]
    Sigmoid,
    /// Sigmoid, corrected for a share of `label_smoothing` of pairs that stand the wrong way round.
    Robust,
    Hinge,
    /// Sigmoid over log-ratios per token.
    SigmoidNorm,
}

/// Direct preference optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DpoSpec {
    pub beta: f64,
    pub loss_type: DpoLoss,
    pub label_smoothing: f64,
}

impl Default for DpoSpec {
    fn default() -> Self {
        Self { beta: 0.1, loss_type: DpoLoss::Sigmoid, label_smoothing: 0.0 }
    }
}

impl Aim for DpoSpec {
    fn rows(&self) -> RowKind {
        RowKind::Pairs
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        positive(path, "beta", self.beta)?;
        let smoothing = self.label_smoothing;
        if self.loss_type == DpoLoss::Robust {
            return real(path, "label_smoothing", smoothing, (0.0..0.5).contains(&smoothing), "0 to below 0.5");
        }
        real(path, "label_smoothing", smoothing, smoothing == 0.0, "0 unless loss_type is robust")
    }

    fn rate(&self) -> f64 {
        RATE
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "−log σ(β·Δ), Δ the log-ratio to the reference of the preferred answer less that of the \
                other; the reference is the base, or the adapter that is continued. Rafailov et al., arXiv 2305.18290.",
            choose_when: "You have pairs of a better and a worse answer to the same prompt.",
            avoid_when: "Your model cannot yet give the preferred answers: learn from demonstrations first, or use orpo.",
        }
    }
}

/// Identity preference optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IpoSpec {
    pub beta: f64,
}

impl Default for IpoSpec {
    fn default() -> Self {
        Self { beta: 0.1 }
    }
}

impl Aim for IpoSpec {
    fn rows(&self) -> RowKind {
        RowKind::Pairs
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        positive(path, "beta", self.beta)
    }

    fn rate(&self) -> f64 {
        RATE
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "(Δ̄ − 1/(2β))², Δ̄ the difference of the log-ratios per token. Azar et al., arXiv 2310.12036.",
            choose_when: "Your pairs are noisy or nearly deterministic, and dpo overfits them.",
            avoid_when: "You have single answers with a thumb up or down: use kto.",
        }
    }
}

/// Kahneman–Tversky optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KtoSpec {
    pub beta: f64,
    pub desirable_weight: f64,
    pub undesirable_weight: f64,
}

impl Default for KtoSpec {
    fn default() -> Self {
        Self { beta: 0.1, desirable_weight: 1.0, undesirable_weight: 1.0 }
    }
}

impl Aim for KtoSpec {
    fn rows(&self) -> RowKind {
        RowKind::Judged
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        positive(path, "beta", self.beta)?;
        positive(path, "desirable_weight", self.desirable_weight)?;
        positive(path, "undesirable_weight", self.undesirable_weight)
    }

    fn rate(&self) -> f64 {
        RATE
    }

    /// Its reference point is the KL divergence over answers of other rows in the micro-batch.
    fn least_batch(&self) -> u64 {
        2
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "λ·(1 − σ(±β(log-ratio − z))), z the divergence from the reference over the micro-batch's \
                mismatched answers. Ethayarajh et al., arXiv 2402.01306.",
            choose_when: "You have single answers with a thumb up or down.",
            avoid_when: "You have pairs for the same prompt: dpo uses them better.",
        }
    }
}

/// Odds ratio preference optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OrpoSpec {
    /// The odds ratio's weight beside the cross entropy (λ in the paper).
    pub beta: f64,
}

impl Default for OrpoSpec {
    fn default() -> Self {
        Self { beta: 0.1 }
    }
}

impl Aim for OrpoSpec {
    fn rows(&self) -> RowKind {
        RowKind::Pairs
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        positive(path, "beta", self.beta)
    }

    fn rate(&self) -> f64 {
        RATE
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "Cross entropy of the preferred row (prompt and answer) − β·log σ(log odds ratio), without a \
                reference. Hong et al., arXiv 2403.07691.",
            choose_when: "You have pairs and no supervised training before them.",
            avoid_when: "The model gives good answers already and must stay near them: use dpo.",
        }
    }
}

/// Simple preference optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SimpoSpec {
    pub beta: f64,
    /// The margin that the mean log-probabilities, times β, shall keep: γ itself, not γ/β.
    pub gamma: f64,
}

impl Default for SimpoSpec {
    fn default() -> Self {
        Self { beta: 2.0, gamma: 1.0 }
    }
}

impl Aim for SimpoSpec {
    fn rows(&self) -> RowKind {
        RowKind::Pairs
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        positive(path, "beta", self.beta)?;
        real(path, "gamma", self.gamma, (0.0..=1000.0).contains(&self.gamma), "0 to 1000")
    }

    fn rate(&self) -> f64 {
        RATE
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "−log σ(β(p̄ preferred − p̄ other) − γ), p̄ the mean log-probability per token, without a \
                reference. Meng et al., arXiv 2405.14734.",
            choose_when: "You have pairs, and dpo makes the answers longer and longer.",
            avoid_when: "The model must stay near where it began: nothing holds it there.",
        }
    }
}

/// A reward model: a score head that tells the better answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardModelSpec {
    /// Draws the two scores of a pair towards opposite signs; 0 leaves them where they are.
    pub center_rewards_coefficient: f64,
}

impl Aim for RewardModelSpec {
    fn rows(&self) -> RowKind {
        RowKind::Pairs
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        let value = self.center_rewards_coefficient;
        real(path, "center_rewards_coefficient", value, (0.0..=100.0).contains(&value), "0 to 100")
    }

    /// With LoRA, 1e-4.
    fn rate(&self) -> f64 {
        0.5
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "−log σ(r preferred − r other − margin) + c·(r + r)², r a linear head on the hidden row of the \
                last token. Bradley and Terry 1952; Ouyang et al., arXiv 2203.02155. Served by POST /v1/classify.",
            choose_when: "You need a score for any answer: to rank, to filter, to train by reinforcement.",
            avoid_when: "You only want a model that answers better: dpo needs no second model.",
        }
    }
}

fn positive(path: &str, field: &str, value: f64) -> Result<(), SpecError> {
    real(path, field, value, value > 0.0 && value <= 1000.0, "above 0, to 1000")
}
