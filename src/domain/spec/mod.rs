//! What a job trains: the method (how the change is parametrised), the objective, and the loop's settings.
//! Every `auto` is filled in before a spec is stored, so that a run can be repeated exactly.

mod adalora;
mod card;
mod dora;
mod full;
mod grader;
mod ia3;
mod lora;
mod moe_lora;
mod objective;
mod p_tuning;
mod prefix_tuning;
mod prompt_tuning;
mod qlora;
mod read;
mod request;
mod saved;
mod targets;
#[cfg(test)]
mod tests;
mod training;
mod unipelt;
mod xlora;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

pub use adalora::{AdaLoraSpec, Budget};
pub use card::Card;
pub use dora::DoraSpec;
pub use full::FullSpec;
pub use grader::{
    Asked, Comparison, Endpoint, Grader, GraderMessage, GraderRole, RewardModel, SamplingParams, ScoreModel, Scoring,
    Similarity, below_key,
};
pub use ia3::{Ia3Spec, Ia3Target};
pub use lora::{LoraInit, LoraInitName, LoraSpec, LoraTarget};
pub use moe_lora::{MoeLoraSpec, MoeVariant, is_feed_forward};
pub use objective::{
    DpoLoss, DpoSpec, Draw, GrpoLoss, GrpoSpec, IpoSpec, KtoSpec, MAX_LABEL, MAX_LABELS, ObjectiveCard, ObjectiveSpec,
    OrpoSpec, PpoSpec, RewardModelSpec, RlooSpec, ScaleRewards, SequenceClassificationSpec, SimpoSpec, SupervisedSpec,
    TokenClassificationSpec, fits as label_fits,
};
pub use p_tuning::{PTuningSpec, Reparameterization};
pub use prefix_tuning::{PTuningV2Spec, PrefixInit, PrefixTuningSpec};
pub use prompt_tuning::{PromptInit, PromptTuningSpec};
pub use qlora::{QloraSpec, QuantType, Quantization};
pub use request::{Hyperparameters, TrainingRequest};
pub use saved::{SavedModule, modules as saved_modules};
pub use targets::{ALL_LINEAR, Targets};
pub use training::{EarlyStopping, Optimizer, Precision, Schedule, Training};
pub use unipelt::{GateMode, UnipeltSpec};
pub use xlora::{XloraExpert, XloraSpec};

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

/// Reads a request's `adapter` object as one method's knobs.
type Read = fn(&Value) -> Result<MethodSpec, SpecError>;

/// Methods that can be trained, by the `type` in requests.
const METHODS: &[(&str, Read)] = &[
    ("lora", |value| read_as(value, MethodSpec::Lora)),
    ("dora", |value| read_as(value, MethodSpec::Dora)),
    ("adalora", |value| read_as(value, MethodSpec::AdaLora)),
    ("ia3", |value| read_as(value, MethodSpec::Ia3)),
    ("prompt_tuning", |value| read_as(value, MethodSpec::PromptTuning)),
    ("p_tuning", |value| read_as(value, MethodSpec::PTuning)),
    ("prefix_tuning", |value| read_as(value, MethodSpec::PrefixTuning)),
    ("p_tuning_v2", |value| read_as(value, MethodSpec::PTuningV2)),
    ("moe_lora", |value| read_as(value, |spec: MoeLoraSpec| MethodSpec::MoeLora(spec.resolved()))),
    ("unipelt", |value| read_as(value, MethodSpec::Unipelt)),
    ("qlora", qlora::read),
    ("xlora", |value| read_as(value, MethodSpec::Xlora)),
    ("full", |value| read_as(value, MethodSpec::Full)),
];

/// A method and its knobs, in PEFT's names. In JSON: `{"type": "lora", "r": 8, …}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MethodSpec {
    Lora(LoraSpec),
    Dora(DoraSpec),
    PromptTuning(PromptTuningSpec),
    PTuning(PTuningSpec),
    PrefixTuning(PrefixTuningSpec),
    PTuningV2(PTuningV2Spec),
    MoeLora(MoeLoraSpec),
    Unipelt(UnipeltSpec),
    #[serde(rename = "adalora")]
    AdaLora(AdaLoraSpec),
    Ia3(Ia3Spec),
    Qlora(QloraSpec),
    Xlora(XloraSpec),
    Full(FullSpec),
}

impl Default for MethodSpec {
    fn default() -> Self {
        MethodSpec::Lora(LoraSpec::default())
    }
}

/// What every method's knobs answer.
pub trait Knobs {
    /// Other spellings in requests.
    fn aliases() -> read::Aliases
    where
        Self: Sized,
    {
        &[]
    }

    /// The learning rate that a job gets when it names none.
    fn learning_rate(&self) -> f64;

    /// Ranges, and what needs the base: rank against shapes, targets that match nothing.
    fn check(&self, base: &BaseInfo) -> Result<(), SpecError>;

    /// The number of trained values on this base.
    fn trainable(&self, base: &BaseInfo) -> u64;

    /// Places of the context that it takes before the text.
    fn virtual_tokens(&self) -> usize {
        0
    }

    /// The field by which it changes the output layer.
    fn head_field(&self, base: &BaseInfo) -> Option<&'static str> {
        _ = base;
        None
    }

    /// The field by which a token sees those behind it: such an adapter judges texts and cannot write them.
    fn sees_ahead(&self) -> Option<&'static str> {
        None
    }

    /// Generations of the adapters that a fresh one is made of.
    fn sources(&self) -> Vec<&str> {
        Vec::new()
    }

    /// What users read before they choose.
    fn card(&self) -> Card;

    /// Fills in what depends on the base and on the number of optimiser steps, once `check` has passed; refuses a
    /// schedule that does not fit them.
    fn fit(&mut self, base: &BaseInfo, steps: u64) -> Result<(), SpecError> {
        _ = (base, steps);
        Ok(())
    }
}

fn read_as<T>(value: &Value, variant: fn(T) -> MethodSpec) -> Result<MethodSpec, SpecError>
where
    T: Knobs + Default + Serialize + DeserializeOwned,
{
    read::object(value, "adapter", T::aliases(), "type").map(variant)
}

impl MethodSpec {
    fn knobs(&self) -> &dyn Knobs {
        match self {
            MethodSpec::Lora(spec) => spec,
            MethodSpec::Dora(spec) => spec,
            MethodSpec::AdaLora(spec) => spec,
            MethodSpec::Ia3(spec) => spec,
            MethodSpec::PromptTuning(spec) => spec,
            MethodSpec::PTuning(spec) => spec,
            MethodSpec::PrefixTuning(spec) => spec,
            MethodSpec::PTuningV2(spec) => spec,
            MethodSpec::MoeLora(spec) => spec,
            MethodSpec::Unipelt(spec) => spec,
            MethodSpec::Qlora(spec) => spec,
            MethodSpec::Xlora(spec) => spec,
            MethodSpec::Full(spec) => spec,
        }
    }

    fn knobs_mut(&mut self) -> &mut dyn Knobs {
        match self {
            MethodSpec::Lora(spec) => spec,
            MethodSpec::Dora(spec) => spec,
            MethodSpec::AdaLora(spec) => spec,
            MethodSpec::Ia3(spec) => spec,
            MethodSpec::PromptTuning(spec) => spec,
            MethodSpec::PTuning(spec) => spec,
            MethodSpec::PrefixTuning(spec) => spec,
            MethodSpec::PTuningV2(spec) => spec,
            MethodSpec::MoeLora(spec) => spec,
            MethodSpec::Unipelt(spec) => spec,
            MethodSpec::Qlora(spec) => spec,
            MethodSpec::Xlora(spec) => spec,
            MethodSpec::Full(spec) => spec,
        }
    }

    /// The `type` in requests.
    pub fn type_name(&self) -> &'static str {
        match self {
            MethodSpec::Lora(_) => "lora",
            MethodSpec::Dora(_) => "dora",
            MethodSpec::PromptTuning(_) => "prompt_tuning",
            MethodSpec::PTuning(_) => "p_tuning",
            MethodSpec::PrefixTuning(_) => "prefix_tuning",
            MethodSpec::PTuningV2(_) => "p_tuning_v2",
            MethodSpec::MoeLora(_) => "moe_lora",
            MethodSpec::Unipelt(_) => "unipelt",
            MethodSpec::AdaLora(_) => "adalora",
            MethodSpec::Ia3(_) => "ia3",
            MethodSpec::Qlora(_) => "qlora",
            MethodSpec::Xlora(_) => "xlora",
            MethodSpec::Full(_) => "full",
        }
    }

    /// Each method with its defaults.
    pub fn all() -> Vec<Self> {
        METHODS.iter().filter_map(|(_, read)| read(&json!({})).ok()).collect()
    }

    /// The learning rate that a job gets when it names none.
    pub fn default_learning_rate(&self) -> f64 {
        self.knobs().learning_rate()
    }

    /// Reads the request's `adapter` object; unknown fields and types are errors by name. Without a `type`, LoRA.
    pub fn from_json(value: &Value) -> Result<Self, SpecError> {
        let fields = read::fields(value, "adapter")?;
        let name = match fields.get("type") {
            None | Some(Value::Null) => "lora",
            Some(Value::String(name)) => name,
            Some(_) => return Err(SpecError::new("adapter.type", "spec_invalid_type", "adapter.type is not a string")),
        };
        if let Some((_, read)) = METHODS.iter().find(|(known, _)| *known == name) {
            return read(value);
        }
        let known: Vec<&str> = METHODS.iter().map(|(name, _)| *name).collect();
        let message = format!("unknown method {name}; known are {}", known.join(", "));
        Err(SpecError::new("adapter.type", "spec_unknown_type", message))
    }

    /// Whether a request leaves the choice to the server: `{"type": "auto"}`, which takes no knobs.
    pub fn is_auto(value: &Value) -> Result<bool, SpecError> {
        let fields = read::fields(value, "adapter")?;
        if fields.get("type").and_then(Value::as_str) != Some("auto") {
            return Ok(false);
        }
        match fields.iter().find(|(key, value)| *key != "type" && !value.is_null()) {
            None => Ok(true),
            Some((key, _)) => {
                let param = read::join("adapter", key);
                let message = format!("unknown field {param}: the type auto takes no knobs");
                Err(SpecError::new(param, "spec_unknown_field", message))
            }
        }
    }

    /// Ranges, and what needs the base: rank against shapes, targets that match nothing.
    pub fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        self.knobs().check(base)
    }

    /// Whether it can learn this: an objective's own head takes the output layer's place, and without one text is
    /// written.
    pub fn check_objective(&self, base: &BaseInfo, objective: &ObjectiveSpec) -> Result<(), SpecError> {
        let name = objective.type_name();
        let (field, why) = match objective.head() {
            Some(_) => {
                (self.knobs().head_field(base), "has a head of its own in the place of lm_head, which it would train")
            }
            None => (self.sees_ahead(), "teaches to write, and a token would see those behind it, not written yet"),
        };
        let Some(field) = field else { return Ok(()) };
        let param = read::join("adapter", field);
        Err(SpecError::new(param.clone(), "spec_conflict", format!("{param} does not go with {name}, which {why}")))
    }

    /// The field by which a token sees those behind it: such an adapter judges texts and cannot write them.
    pub fn sees_ahead(&self) -> Option<&'static str> {
        self.knobs().sees_ahead()
    }

    /// The number of trained values on this base.
    pub fn trainable(&self, base: &BaseInfo) -> u64 {
        self.knobs().trainable(base)
    }

    /// Places of the context that it takes before the text.
    pub fn virtual_tokens(&self) -> usize {
        self.knobs().virtual_tokens()
    }

    /// Generations of the adapters that a fresh one is made of.
    pub fn sources(&self) -> Vec<&str> {
        self.knobs().sources()
    }

    pub fn card(&self) -> Card {
        self.knobs().card()
    }

    /// Fills in what depends on the base and on the number of optimiser steps, or says what does not fit them.
    pub fn fit(&mut self, base: &BaseInfo, steps: u64) -> Result<(), SpecError> {
        self.knobs_mut().fit(base, steps)
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
