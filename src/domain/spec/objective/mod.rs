//! What is optimised, as the request's `method` object names it.

mod classification;
mod online;
mod ppo;
mod preference;
mod supervised;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    Grader, Hyperparameters, SpecError, Training,
    read::{self, fields, join, out_of_range},
};
use crate::domain::{TaskHead, dataset::RowKind};

pub use classification::{MAX_LABEL, MAX_LABELS, SequenceClassificationSpec, TokenClassificationSpec, fits};
pub use online::{Draw, GrpoLoss, GrpoSpec, RlooSpec, ScaleRewards};
pub use ppo::PpoSpec;
pub use preference::{DpoLoss, DpoSpec, IpoSpec, KtoSpec, OrpoSpec, RewardModelSpec, SimpoSpec};
pub use supervised::SupervisedSpec;

/// Reads the knobs at a path of the request.
type Read = fn(&Value, &str) -> Result<ObjectiveSpec, SpecError>;

/// Objectives that can be run, by the `type` in requests.
const OBJECTIVES: &[(&str, Read)] = &[
    ("supervised", |value, path| read_as(value, path, ObjectiveSpec::Supervised)),
    ("dpo", |value, path| read_as(value, path, ObjectiveSpec::Dpo)),
    ("ipo", |value, path| read_as(value, path, ObjectiveSpec::Ipo)),
    ("kto", |value, path| read_as(value, path, ObjectiveSpec::Kto)),
    ("orpo", |value, path| read_as(value, path, ObjectiveSpec::Orpo)),
    ("simpo", |value, path| read_as(value, path, ObjectiveSpec::Simpo)),
    ("reward_model", |value, path| read_as(value, path, ObjectiveSpec::RewardModel)),
    ("sequence_classification", |value, path| read_as(value, path, ObjectiveSpec::SequenceClassification)),
    ("token_classification", |value, path| read_as(value, path, ObjectiveSpec::TokenClassification)),
    ("grpo", |value, path| read_as(value, path, ObjectiveSpec::Grpo)),
    ("rloo", |value, path| read_as(value, path, ObjectiveSpec::Rloo)),
    ("ppo", |value, path| read_as(value, path, ObjectiveSpec::Ppo)),
    ("reinforcement", |value, path| read_as(value, path, ObjectiveSpec::Reinforcement)),
];

/// Read beside the knobs (`Hyperparameters`); errors list them.
const BESIDE: read::Aliases =
    &[("n_epochs", "n_epochs"), ("batch_size", "batch_size"), ("learning_rate_multiplier", "learning_rate_multiplier")];

/// What is optimised, and its knobs in TRL's names. In JSON: `{"type": "dpo", "beta": 0.1, …}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ObjectiveSpec {
    Supervised(SupervisedSpec),
    Dpo(DpoSpec),
    Ipo(IpoSpec),
    Kto(KtoSpec),
    Orpo(OrpoSpec),
    Simpo(SimpoSpec),
    RewardModel(RewardModelSpec),
    SequenceClassification(SequenceClassificationSpec),
    TokenClassification(TokenClassificationSpec),
    Grpo(GrpoSpec),
    Rloo(RlooSpec),
    Ppo(PpoSpec),
    /// OpenAI's name for grpo with a grader.
    Reinforcement(GrpoSpec),
}

impl Default for ObjectiveSpec {
    fn default() -> Self {
        ObjectiveSpec::Supervised(SupervisedSpec {})
    }
}

/// What users read before they choose an objective.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectiveCard {
    /// The formula, with its source.
    pub definition: &'static str,
    pub choose_when: &'static str,
    pub avoid_when: &'static str,
}

/// What every objective's knobs answer.
pub trait Aim {
    /// What it reads of a dataset.
    fn rows(&self) -> RowKind;

    /// Ranges; `path` is where the knobs stand in the request.
    fn check(&self, path: &str) -> Result<(), SpecError> {
        let _ = path;
        Ok(())
    }

    /// The learning rate that a job gets when it names none, as a multiple of the method's.
    fn rate(&self) -> f64;

    /// The smallest micro-batch that it makes sense with.
    fn least_batch(&self) -> u64 {
        1
    }

    /// What judges completions, for objectives that learn from them; none inside while no one is named.
    fn grader(&self) -> Option<Option<&Grader>> {
        None
    }

    /// What rows may be called, for objectives that learn that; none while nobody has said it.
    fn labels(&self) -> Option<&[String]> {
        None
    }

    /// How completions are drawn, for objectives that learn from them.
    fn draw(&self) -> Option<Draw> {
        None
    }

    fn card(&self) -> ObjectiveCard;
}

fn read_as<T>(value: &Value, path: &str, variant: fn(T) -> ObjectiveSpec) -> Result<ObjectiveSpec, SpecError>
where
    T: Aim + Default + Serialize + DeserializeOwned,
{
    let spec: T = read::object(value, path, BESIDE, "")?;
    spec.check(path)?;
    Ok(variant(spec))
}

impl ObjectiveSpec {
    fn aim(&self) -> &dyn Aim {
        match self {
            ObjectiveSpec::Supervised(spec) => spec,
            ObjectiveSpec::Dpo(spec) => spec,
            ObjectiveSpec::Ipo(spec) => spec,
            ObjectiveSpec::Kto(spec) => spec,
            ObjectiveSpec::Orpo(spec) => spec,
            ObjectiveSpec::Simpo(spec) => spec,
            ObjectiveSpec::RewardModel(spec) => spec,
            ObjectiveSpec::SequenceClassification(spec) => spec,
            ObjectiveSpec::TokenClassification(spec) => spec,
            ObjectiveSpec::Grpo(spec) | ObjectiveSpec::Reinforcement(spec) => spec,
            ObjectiveSpec::Rloo(spec) => spec,
            ObjectiveSpec::Ppo(spec) => spec,
        }
    }

    /// The `type` in requests.
    pub fn type_name(&self) -> &'static str {
        match self {
            ObjectiveSpec::Supervised(_) => "supervised",
            ObjectiveSpec::Dpo(_) => "dpo",
            ObjectiveSpec::Ipo(_) => "ipo",
            ObjectiveSpec::Kto(_) => "kto",
            ObjectiveSpec::Orpo(_) => "orpo",
            ObjectiveSpec::Simpo(_) => "simpo",
            ObjectiveSpec::RewardModel(_) => "reward_model",
            ObjectiveSpec::SequenceClassification(_) => "sequence_classification",
            ObjectiveSpec::TokenClassification(_) => "token_classification",
            ObjectiveSpec::Grpo(_) => "grpo",
            ObjectiveSpec::Rloo(_) => "rloo",
            ObjectiveSpec::Ppo(_) => "ppo",
            ObjectiveSpec::Reinforcement(_) => "reinforcement",
        }
    }

    /// Each objective with its defaults.
    pub fn all() -> Vec<Self> {
        OBJECTIVES.iter().filter_map(|(_, read)| read(&json!({}), "").ok()).collect()
    }

    /// What it reads of a dataset.
    pub fn rows(&self) -> RowKind {
        self.aim().rows()
    }

    /// What rows may be called, for objectives that learn that; none while nobody has said it.
    pub fn labels(&self) -> Option<&[String]> {
        self.aim().labels()
    }

    /// Takes the labels of the training file.
    pub fn with_labels(&mut self, labels: Vec<String>) {
        match self {
            ObjectiveSpec::SequenceClassification(spec) => spec.labels = Some(labels),
            ObjectiveSpec::TokenClassification(spec) => spec.labels = Some(labels),
            _ => {}
        }
    }

    /// The head that it trains over the method; none where it needs none.
    pub fn head(&self) -> Option<TaskHead> {
        let labels = self.labels().unwrap_or_default().to_vec();
        match self {
            ObjectiveSpec::RewardModel(_) => Some(TaskHead::Score),
            ObjectiveSpec::SequenceClassification(_) => Some(TaskHead::Sequence { labels }),
            ObjectiveSpec::TokenClassification(spec) => Some(TaskHead::Token { labels, word_token: spec.word_token }),
            _ => None,
        }
    }

    /// The learning rate that a job gets when it names none, as a multiple of the method's.
    pub fn rate(&self) -> f64 {
        self.aim().rate()
    }

    /// The smallest micro-batch that it makes sense with.
    pub fn least_batch(&self) -> u64 {
        self.aim().least_batch()
    }

    pub fn card(&self) -> ObjectiveCard {
        self.aim().card()
    }

    /// What judges completions, for objectives that learn from them; none inside while no one is named.
    pub fn grader(&self) -> Option<Option<&Grader>> {
        self.aim().grader()
    }

    /// How completions are drawn, for objectives that learn from them.
    pub fn draw(&self) -> Option<Draw> {
        self.aim().draw()
    }

    /// Where its grader stands in a request.
    pub fn grader_path(&self) -> String {
        format!("method.{}.grader", self.type_name())
    }

    /// Where its hyperparameters stand in a request.
    pub fn path(&self) -> String {
        format!("method.{}.hyperparameters", self.type_name())
    }

    /// Its knobs as JSON; a grader is none of them.
    pub fn knobs(&self) -> Value {
        let mut knobs = serde_json::to_value(self).unwrap_or_default();
        if let Some(fields) = knobs.as_object_mut() {
            fields.shift_remove("type");
            fields.shift_remove("grader");
        }
        knobs
    }

    /// What needs the loop's settings.
    pub fn check(&self, training: &Training) -> Result<(), SpecError> {
        if let Some(draw) = self.draw()
            && draw.max_completion_length >= training.max_seq_len
        {
            let (param, most) = (join(&self.path(), "max_completion_length"), training.max_seq_len);
            let limits = format!("below training.max_seq_len, {most}: prompts need room too");
            return Err(out_of_range(&param, draw.max_completion_length, &limits));
        }
        if self.draw().is_some() && training.validation_split > 0.0 {
            let limits = format!("0: {} is judged by its rewards", self.type_name());
            return Err(out_of_range("training.validation_split", training.validation_split, &limits));
        }
        let (least, batch) = (self.least_batch(), training.batch_size);
        if batch < least {
            let param = join(&self.path(), "batch_size");
            return Err(out_of_range(&param, batch, &format!("at least {least}: {} compares rows", self.type_name())));
        }
        Ok(())
    }

    /// Reads the request's `method`: `{"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, …}}}`.
    pub fn from_json(method: &Value) -> Result<Self, SpecError> {
        let fields = fields(method, "method")?;
        let name = match fields.get("type") {
            None | Some(Value::Null) => "supervised",
            Some(Value::String(name)) => name,
            Some(_) => return Err(SpecError::new("method.type", "spec_invalid_type", "method.type is not a string")),
        };
        let known: Vec<&str> = OBJECTIVES.iter().map(|(name, _)| *name).collect();
        let Some((own, read)) = OBJECTIVES.iter().find(|(known, _)| *known == name) else {
            let message = format!("unknown objective {name}; known are {}", known.join(", "));
            return Err(SpecError::new("method.type", "spec_unknown_type", message));
        };
        if let Some((key, _)) = fields.iter().find(|(key, value)| *key != "type" && key != own && !value.is_null()) {
            let param = join("method", key);
            let message = format!("unknown field {param}; known beside type is {own}");
            return Err(SpecError::new(param, "spec_unknown_field", message));
        }
        let (_, knobs) = Hyperparameters::split(method, own)?;
        let path = join(&join("method", own), "hyperparameters");
        // The grader was read with the knobs, but stands beside them.
        let beside = |text: String| text.replace(&join(&path, "grader"), &format!("method.{own}.grader"));
        let spec = read(&knobs, &path)
            .map_err(|error| SpecError::new(beside(error.param), error.code, beside(error.message)))?;
        match spec.grader() {
            Some(None) => {
                let param = spec.grader_path();
                let message = format!("{param} is missing: it says what a completion is worth");
                Err(SpecError::new(param, "spec_missing", message))
            }
            Some(Some(grader)) => {
                grader.check(&spec.grader_path())?;
                Ok(spec)
            }
            None => Ok(spec),
        }
    }
}

/// A number inside its range.
fn real(path: &str, field: &str, value: f64, fits: bool, limits: &str) -> Result<(), SpecError> {
    if fits { Ok(()) } else { Err(out_of_range(&join(path, field), value, limits)) }
}

/// A whole number inside its range.
fn whole(path: &str, field: &str, value: u64, least: u64, most: u64) -> Result<(), SpecError> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(out_of_range(&join(path, field), value, &format!("{least} to {most}"))),
    }
}
