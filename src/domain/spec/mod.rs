//! What a job trains: the method (how the change is parametrised), the objective, and the loop's settings.
//! Every `auto` is filled in before a spec is stored, so that a run can be repeated exactly.

mod lora;
mod training;

use serde::{Deserialize, Serialize};

pub use lora::{LoraSpec, Targets};
pub use training::{EarlyStopping, Precision, Schedule, Training};

use super::BaseInfo;

/// A request that cannot be run, by the field at fault.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct SpecError {
    /// The path in the request: `adapter.r`, `training.max_seq_len`.
    pub param: String,
    /// `spec_unknown_field`, `spec_out_of_range`, `spec_no_match` …
    pub code: &'static str,
    /// Names the value and the limit.
    pub message: String,
}

impl SpecError {
    pub fn new(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self { param: param.into(), code, message: message.into() }
    }
}

/// A method and its knobs, in PEFT's names. In JSON: `{"type": "lora", "r": 8, …}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MethodSpec {
    Lora(LoraSpec),
}

impl MethodSpec {
    /// The `type` in requests.
    pub fn type_name(&self) -> &'static str {
        match self {
            MethodSpec::Lora(_) => "lora",
        }
    }

    /// The learning rate that a job gets when it names none.
    pub fn default_learning_rate(&self) -> f64 {
        match self {
            MethodSpec::Lora(_) => 2e-4,
        }
    }

    /// Reads the request's `adapter` object; unknown fields and types are errors by name.
    pub fn from_json(value: &serde_json::Value) -> Result<Self, SpecError> {
        let _ = value;
        todo!("methods helper")
    }

    /// Ranges, and what needs the base: rank against shapes, targets that match nothing.
    pub fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        match self {
            MethodSpec::Lora(lora) => lora.check(base),
        }
    }

    /// The number of trained values on this base.
    pub fn trainable(&self, base: &BaseInfo) -> u64 {
        match self {
            MethodSpec::Lora(lora) => lora.trainable(base),
        }
    }
}

/// What is optimised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ObjectiveSpec {
    /// Next-token cross entropy over the assistant's tokens.
    Supervised,
}

impl ObjectiveSpec {
    pub fn type_name(&self) -> &'static str {
        match self {
            ObjectiveSpec::Supervised => "supervised",
        }
    }
}

/// Everything that decides a run's result, besides the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// The base's id.
    pub base: String,
    /// The generation of the adapter that this job continues.
    pub continue_from: Option<String>,
    pub suffix: Option<String>,
    pub adapter: MethodSpec,
    pub objective: ObjectiveSpec,
    pub training: Training,
    pub seed: u64,
}
