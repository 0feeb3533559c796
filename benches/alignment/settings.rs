//! Everything that was tuned, in one table: `settings.json`, or another file of its shape.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub base: BaseSettings,
    /// Of all sides.
    pub adapter: Value,
    /// Of the divergence, from the largest: the points of a curve.
    pub weights: Vec<f64>,
    pub sides: BTreeMap<String, Side>,
}

/// How the base learns the language.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseSettings {
    /// How many it reads.
    pub answers: u64,
    pub adapter: Value,
    pub training: Value,
}

/// One run of an effect.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Side {
    pub objective: String,
    #[serde(default)]
    pub knobs: BTreeMap<String, Value>,
    pub training: BTreeMap<String, Value>,
}

impl Settings {
    pub fn read(path: Option<&Path>) -> Result<Self> {
        match path {
            None => Ok(serde_json::from_str(include_str!("settings.json"))?),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
                serde_json::from_str(&text).with_context(|| path.display().to_string())
            }
        }
    }

    pub fn side(&self, name: &str) -> Result<&Side> {
        self.sides.get(name).with_context(|| format!("the settings have no side {name}"))
    }
}

impl Side {
    /// With another knob.
    pub fn with(&self, knob: &str, value: f64) -> Side {
        let mut side = self.clone();
        side.knobs.insert(knob.to_owned(), value.into());
        side
    }
}
