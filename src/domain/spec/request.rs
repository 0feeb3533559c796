//! The request's training settings, before their `auto`s are filled in.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    EarlyStopping, MethodSpec, ObjectiveSpec, Optimizer, Precision, Schedule, SpecError, Training,
    read::{self, fields, join, out_of_range},
};
use crate::domain::BaseInfo;

/// OpenAI's three, beside the objective's own: `method.dpo.hyperparameters`, or the older top-level
/// `hyperparameters`. None is `auto`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hyperparameters {
    pub n_epochs: Option<u64>,
    pub batch_size: Option<u64>,
    pub learning_rate_multiplier: Option<f64>,
    /// Whose they are.
    #[serde(skip)]
    pub objective: ObjectiveSpec,
}

/// The names of OpenAI's three.
const SHARED: [&str; 3] = ["n_epochs", "batch_size", "learning_rate_multiplier"];

/// Objectives with a grader beside their hyperparameters.
const ONLINE: [&str; 4] = ["grpo", "rloo", "ppo", "reinforcement"];

impl Hyperparameters {
    /// Reads an object at `path`; a field may be `"auto"`.
    pub fn from_json(value: &Value, path: &str) -> Result<Self, SpecError> {
        let mut value = value.clone();
        if let Some(fields) = value.as_object_mut() {
            forget_autos(fields);
        }
        read::object(&value, path, &[], "")
    }

    /// Reads `hyperparameters` inside the request's `method` object, at the place that its type says.
    pub fn from_method(method: &Value) -> Result<Self, SpecError> {
        let objective = ObjectiveSpec::from_json(method)?;
        let (shared, _) = Self::split(method, objective.type_name())?;
        Ok(Self { objective: objective.clone(), ..Self::from_json(&shared, &objective.path())? })
    }

    /// Whether none of the three is given.
    pub fn is_empty(&self) -> bool {
        (self.n_epochs, self.batch_size, self.learning_rate_multiplier) == (None, None, None)
    }

    /// The fields of `method.<name>.hyperparameters`: OpenAI's three, and the objective's own.
    pub(super) fn split(method: &Value, name: &str) -> Result<(Value, Value), SpecError> {
        let path = join("method", name);
        let none = Map::new();
        let own = match method.get(name) {
            None | Some(Value::Null) => &none,
            Some(own) => fields(own, &path)?,
        };
        let known: &[&str] = if ONLINE.contains(&name) { &["hyperparameters", "grader"] } else { &["hyperparameters"] };
        if let Some(key) = own.keys().find(|key| !known.contains(&key.as_str())) {
            let param = join(&path, key);
            let message = format!("unknown field {param}; known are {}", known.join(", "));
            return Err(SpecError::new(param, "spec_unknown_field", message));
        }
        let mut all = match own.get("hyperparameters") {
            None | Some(Value::Null) => Map::new(),
            Some(inner) => fields(inner, &join(&path, "hyperparameters"))?.clone(),
        };
        forget_autos(&mut all);
        let grader = own.get("grader").cloned();
        let (shared, mut own): (Map<_, _>, Map<_, _>) =
            all.into_iter().partition(|(key, _)| SHARED.contains(&key.as_str()));
        if own.contains_key("grader") && ONLINE.contains(&name) {
            let param = join(&join(&path, "hyperparameters"), "grader");
            let message = format!("unknown field {param}; the grader stands beside the hyperparameters");
            return Err(SpecError::new(param, "spec_unknown_field", message));
        }
        own.extend(grader.map(|grader| ("grader".to_owned(), grader)));
        Ok((Value::Object(shared), Value::Object(own)))
    }
}

fn forget_autos(fields: &mut Map<String, Value>) {
    fields.values_mut().filter(|value| value.as_str() == Some("auto")).for_each(|value| *value = Value::Null);
}

/// The request's `training` object and hyperparameters. None is the default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingRequest {
    /// Its place is `method.supervised.hyperparameters`; taken here too, because a job's echoed `training` has it.
    pub n_epochs: Option<u64>,
    pub batch_size: Option<u64>,
    pub learning_rate: Option<f64>,
    pub lr_scheduler: Option<Schedule>,
    pub warmup_ratio: Option<f64>,
    pub max_steps: Option<u64>,
    pub max_seq_len: Option<u64>,
    pub packing: Option<bool>,
    pub grad_accumulation: Option<u64>,
    pub max_grad_norm: Option<f64>,
    pub weight_decay: Option<f64>,
    pub eval_every: Option<u64>,
    pub checkpoint_every: Option<u64>,
    pub early_stopping: Option<EarlyStopping>,
    pub validation_split: Option<f64>,
    pub precision: Option<Precision>,
    pub optimizer: Option<Optimizer>,
    pub gradient_checkpointing: Option<bool>,
    /// Read from the hyperparameters only.
    #[serde(skip)]
    pub learning_rate_multiplier: Option<f64>,
    #[serde(skip)]
    pub objective: ObjectiveSpec,
}

impl TrainingRequest {
    /// `training` is the request's object or null; `hyper` stands beside it in `method`.
    pub fn from_json(training: &Value, hyper: &Hyperparameters) -> Result<Self, SpecError> {
        let mut request: Self =
            if training.is_null() { Self::default() } else { read::object(training, "training", &[], "")? };
        request.n_epochs = once("n_epochs", request.n_epochs, hyper.n_epochs)?;
        request.batch_size = once("batch_size", request.batch_size, hyper.batch_size)?;
        request.learning_rate_multiplier = hyper.learning_rate_multiplier;
        request.objective = hyper.objective.clone();
        Ok(request)
    }
}

impl Training {
    /// Fills in the defaults and checks the ranges. `rows` are those of the training file, 0 if not known yet.
    ///
    /// An automatic batch size is a sixteenth of the rows, at least 1 and at most 8: small sets get enough steps to
    /// learn from, large ones batches that a CPU still works through in seconds.
    pub fn resolve(
        request: &TrainingRequest,
        method: &MethodSpec,
        base: &BaseInfo,
        rows: u64,
    ) -> Result<Self, SpecError> {
        let multiplier = request.learning_rate_multiplier.unwrap_or(1.0);
        if !(multiplier.is_finite() && multiplier > 0.0) {
            let param = join(&request.objective.path(), "learning_rate_multiplier");
            return Err(out_of_range(&param, multiplier, "above 0"));
        }
        let (default_rate, least) =
            (method.default_learning_rate() * request.objective.rate(), request.objective.least_batch());
        // The text's share of the context.
        let context = base.context.saturating_sub(method.virtual_tokens()) as u64;
        let training = Self {
            n_epochs: request.n_epochs.unwrap_or(3),
            batch_size: request.batch_size.unwrap_or((rows / 16).clamp(least, 8)),
            learning_rate: request.learning_rate.unwrap_or(default_rate * multiplier),
            lr_scheduler: request.lr_scheduler.unwrap_or(Schedule::Linear),
            warmup_ratio: request.warmup_ratio.unwrap_or(0.0),
            max_steps: request.max_steps,
            max_seq_len: request.max_seq_len.unwrap_or(context.min(1024)),
            packing: request.packing.unwrap_or(false),
            grad_accumulation: request.grad_accumulation.unwrap_or(1),
            max_grad_norm: request.max_grad_norm.unwrap_or(1.0),
            weight_decay: request.weight_decay.unwrap_or(0.0),
            eval_every: request.eval_every,
            checkpoint_every: request.checkpoint_every,
            early_stopping: request.early_stopping.clone(),
            validation_split: request.validation_split.unwrap_or(0.0),
            precision: request.precision.unwrap_or(Precision::Auto),
            optimizer: request.optimizer.unwrap_or_default(),
            gradient_checkpointing: request.gradient_checkpointing.unwrap_or(false),
        };
        training.check(context, &request.objective.path()).map_err(|error| match method.virtual_tokens() {
            taken if taken > 0 && error.param == "training.max_seq_len" => SpecError {
                message: format!("{}: the context of {} without {taken} virtual tokens", error.message, base.context),
                ..error
            },
            _ => error,
        })?;
        request.objective.check(&training)?;
        Ok(training)
    }

    fn check(&self, context: u64, hyper: &str) -> Result<(), SpecError> {
        let hyper = |name: &str| join(hyper, name);
        whole(&hyper("n_epochs"), Some(self.n_epochs), 1, 1000)?;
        whole(&hyper("batch_size"), Some(self.batch_size), 1, 1024)?;
        whole("training.max_steps", self.max_steps, 1, u64::from(u32::MAX))?;
        whole("training.max_seq_len", Some(self.max_seq_len), 2, context)?;
        whole("training.grad_accumulation", Some(self.grad_accumulation), 1, 1024)?;
        whole("training.eval_every", self.eval_every, 1, u64::from(u32::MAX))?;
        whole("training.checkpoint_every", self.checkpoint_every, 1, u64::from(u32::MAX))?;
        let patience = self.early_stopping.as_ref().map(|early| early.patience);
        whole("training.early_stopping.patience", patience, 1, u64::from(u32::MAX))?;
        real("training.learning_rate", self.learning_rate, 1.0)?;
        if self.learning_rate == 0.0 {
            return Err(out_of_range("training.learning_rate", 0, "above 0"));
        }
        real("training.warmup_ratio", self.warmup_ratio, 1.0)?;
        real("training.max_grad_norm", self.max_grad_norm, 1e6)?;
        real("training.weight_decay", self.weight_decay, 1.0)?;
        real("training.validation_split", self.validation_split, 0.9)
    }
}

fn once(name: &str, here: Option<u64>, hyper: Option<u64>) -> Result<Option<u64>, SpecError> {
    match (here, hyper) {
        (Some(a), Some(b)) if a != b => {
            let message = format!("{name} is {a} in training and {b} in the hyperparameters");
            Err(SpecError::new(join("training", name), "spec_given_twice", message))
        }
        (a, b) => Ok(a.or(b)),
    }
}

fn whole(param: &str, value: Option<u64>, least: u64, most: u64) -> Result<(), SpecError> {
    match value {
        Some(value) if !(least..=most).contains(&value) => {
            Err(out_of_range(param, value, &format!("{least} to {most}")))
        }
        _ => Ok(()),
    }
}

fn real(param: &str, value: f64, most: f64) -> Result<(), SpecError> {
    if (0.0..=most).contains(&value) { Ok(()) } else { Err(out_of_range(param, value, &format!("0 to {most}"))) }
}
