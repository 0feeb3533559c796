//! LoRA's knobs (Hu et al., arXiv 2106.09685; rsLoRA, arXiv 2312.03732), with PEFT's names and meaning.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::SpecError;
use crate::domain::BaseInfo;

/// Which modules a method changes: a list of names, a regular expression over whole paths, or `all-linear`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// `all-linear`, or a regular expression that matches a module's whole path.
    Pattern(String),
    /// A module matches when its path equals an entry or ends with `.` and the entry.
    Names(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSpec {
    pub r: usize,
    #[serde(alias = "alpha")]
    pub lora_alpha: f64,
    #[serde(alias = "dropout")]
    pub lora_dropout: f64,
    pub target_modules: Targets,
    pub exclude_modules: Option<Targets>,
    /// Scale alpha/√r instead of alpha/r.
    pub use_rslora: bool,
    /// Other ranks for modules whose path matches the key, first match wins.
    pub rank_pattern: IndexMap<String, usize>,
    pub alpha_pattern: IndexMap<String, f64>,
    /// Only these decoder layers.
    pub layers_to_transform: Option<Vec<usize>>,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: Targets::Pattern("all-linear".to_owned()),
            exclude_modules: None,
            use_rslora: false,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            layers_to_transform: None,
        }
    }
}

impl LoraSpec {
    pub fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let _ = base;
        todo!("methods helper")
    }

    pub fn trainable(&self, base: &BaseInfo) -> u64 {
        let _ = base;
        todo!("methods helper")
    }
}
