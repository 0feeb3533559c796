//! Which modules a method changes, by PEFT's rules.

use regex::Regex;
use serde::{Deserialize, Serialize};

use super::SpecError;
use crate::domain::{BaseInfo, Site};

/// Every linear of the decoder layers, without the output layer.
pub const ALL_LINEAR: &str = "all-linear";

/// Modules that PEFT can adapt and we cannot yet.
const REFUSED: [&str; 2] = ["lm_head", "model.embed_tokens"];

/// Which modules a method changes: a list of names, a regular expression over whole paths, or `all-linear`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum Targets {
    /// `all-linear`, or a regular expression that matches a module's whole path.
    Pattern(String),
    /// A module matches when its path equals an entry or ends with `.` and the entry.
    Names(Vec<String>),
}

impl Targets {
    pub fn matcher(&self, param: &str) -> Result<Matcher, SpecError> {
        Ok(match self {
            Targets::Pattern(text) if text == ALL_LINEAR => Matcher::AllLinear,
            Targets::Pattern(text) => Matcher::Regex(whole(text, param)?),
            Targets::Names(names) => Matcher::Names(names.clone()),
        })
    }

    /// Refuses targets that match nothing, each by its name, and modules that cannot be adapted yet.
    pub fn check(&self, base: &BaseInfo, param: &str) -> Result<(), SpecError> {
        let matcher = self.matcher(param)?;
        if let Some(path) = REFUSED.iter().find(|path| matcher.matches(path)) {
            let message = format!("{path} cannot be adapted yet; targets are the linears of the decoder layers");
            return Err(SpecError::new(param, "spec_unsupported", message));
        }
        let missing = match self {
            Targets::Names(names) if names.is_empty() => Some("the empty list"),
            Targets::Names(names) => {
                names.iter().map(String::as_str).find(|name| !base_has(base, |path| names_module(name, path)))
            }
            Targets::Pattern(text) if !base_has(base, |path| matcher.matches(path)) => Some(text.as_str()),
            Targets::Pattern(_) => None,
        };
        match missing {
            None => Ok(()),
            Some(name) => Err(no_match(param, name, base)),
        }
    }
}

/// `Targets`, ready to be asked.
pub enum Matcher {
    AllLinear,
    Regex(Regex),
    Names(Vec<String>),
}

impl Matcher {
    /// `path` is a module's full path without `base_model.model.`.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Matcher::AllLinear => !REFUSED.contains(&path),
            Matcher::Regex(regex) => regex.is_match(path),
            Matcher::Names(names) => names.iter().any(|name| names_module(name, path)),
        }
    }
}

/// A key of `rank_pattern` or `alpha_pattern`: the end of a path, from a dot on.
pub fn suffix(key: &str, param: &str) -> Result<Regex, SpecError> {
    compile(&format!(r"^(?:.*\.)?(?:{key})$"), key, param)
}

pub fn no_match(param: &str, name: &str, base: &BaseInfo) -> SpecError {
    let modules: Vec<&str> = Site::LAYER.iter().map(|site| site.module()).collect();
    let message = format!(
        "{name} matches no module of {}; it has {} layers model.layers.N with {}",
        base.id,
        base.layers,
        modules.join(", ")
    );
    SpecError::new(param, "spec_no_match", message)
}

fn base_has(base: &BaseInfo, matches: impl Fn(&str) -> bool) -> bool {
    base.linears().any(|(layer, site)| matches(&site.path(layer)))
}

fn names_module(name: &str, path: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn whole(text: &str, param: &str) -> Result<Regex, SpecError> {
    compile(&format!("^(?:{text})$"), text, param)
}

fn compile(pattern: &str, text: &str, param: &str) -> Result<Regex, SpecError> {
    Regex::new(pattern).map_err(|error| {
        // The crate's message spans lines; its last one says what is wrong.
        let reason = error.to_string().lines().last().unwrap_or_default().trim().to_owned();
        SpecError::new(param, "spec_invalid_pattern", format!("{text} is not a regular expression: {reason}"))
    })
}
