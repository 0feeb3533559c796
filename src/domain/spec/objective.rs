//! What is optimised, as the request's `method` object names it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    SpecError,
    read::{fields, join},
};

/// Objectives that the wire knows and that cannot be run yet.
const PLANNED: [&str; 10] =
    ["dpo", "ipo", "kto", "orpo", "simpo", "reward_model", "ppo", "grpo", "rloo", "reinforcement"];

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

    /// Reads the request's `method`: `{"type": "supervised", "supervised": {"hyperparameters": {…}}}`.
    /// The hyperparameters are `Hyperparameters::from_method`'s.
    pub fn from_json(method: &Value) -> Result<Self, SpecError> {
        let fields = fields(method, "method")?;
        let name = match fields.get("type") {
            None | Some(Value::Null) => "supervised",
            Some(Value::String(name)) => name,
            Some(_) => return Err(SpecError::new("method.type", "spec_invalid_type", "method.type is not a string")),
        };
        let objective = match name {
            "supervised" => ObjectiveSpec::Supervised,
            planned if PLANNED.contains(&planned) => {
                let message = format!("the objective {planned} is not available yet; supervised is");
                return Err(SpecError::new("method.type", "spec_unsupported", message));
            }
            unknown => {
                let message = format!("unknown objective {unknown}; known are supervised, {}", PLANNED.join(", "));
                return Err(SpecError::new("method.type", "spec_unknown_type", message));
            }
        };
        let own = objective.type_name();
        match fields.iter().find(|(key, value)| *key != "type" && *key != own && !value.is_null()) {
            None => Ok(objective),
            Some((key, _)) => {
                let param = join("method", key);
                let message = format!("unknown field {param}; known beside type is {own}");
                Err(SpecError::new(param, "spec_unknown_field", message))
            }
        }
    }
}
