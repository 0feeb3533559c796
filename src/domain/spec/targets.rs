//! Which modules a method changes, by PEFT's rules.

use regex::Regex;
use serde::{Deserialize, Deserializer, Serialize};

use super::{SpecError, read::out_of_range};
use crate::domain::{BaseInfo, Site};

/// Every linear of the decoder layers, without the output layer.
pub const ALL_LINEAR: &str = "all-linear";

/// Modules outside of the decoder layers, which some methods can change.
const ENDS: [Site; 2] = [Site::Embed, Site::Head];

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

    /// Refuses targets that match nothing, each by its name, and modules outside of the layers.
    pub fn check(&self, base: &BaseInfo, param: &str) -> Result<(), SpecError> {
        self.check_with(base, param, &[])
    }

    /// The same for a method that can also change the modules `ends`.
    fn check_with(&self, base: &BaseInfo, param: &str, ends: &[Site]) -> Result<(), SpecError> {
        let matcher = self.matcher(param)?;
        let outside = ENDS.iter().filter(|site| !ends.contains(site)).map(|site| site.module());
        if let Some(path) = outside.into_iter().find(|path| matcher.matches(path)) {
            let message = format!("{path} cannot be adapted by this method; targets are the linears of the layers");
            return Err(SpecError::new(param, "spec_unsupported", message));
        }
        let base_has = |base: &BaseInfo, matches: &dyn Fn(&str) -> bool| {
            base_has(base, matches) || ends.iter().any(|site| matches(site.module()))
        };
        let missing = match self {
            Targets::Names(names) if names.is_empty() => Some("the empty list"),
            Targets::Names(names) => {
                names.iter().map(String::as_str).find(|name| !base_has(base, &|path| names_module(name, path)))
            }
            Targets::Pattern(text) if !base_has(base, &|path| matcher.matches(path)) => Some(text.as_str()),
            Targets::Pattern(_) => None,
        };
        match missing {
            None => Ok(()),
            Some(name) => Err(no_match(param, name, base)),
        }
    }
}

/// The three fields that choose modules, in the request's `adapter` object.
#[derive(Clone, Copy)]
pub struct Selection<'a> {
    /// `target_modules`
    pub include: &'a Targets,
    /// `exclude_modules`
    pub exclude: Option<&'a Targets>,
    /// `layers_to_transform`
    pub layers: Option<&'a [usize]>,
}

impl Selection<'_> {
    /// The chosen linears, in the order of the forward pass.
    pub fn linears(&self, base: &BaseInfo) -> Result<Vec<(usize, Site)>, SpecError> {
        let include = self.include.matcher("adapter.target_modules")?;
        let exclude = self.exclude.map(|targets| targets.matcher("adapter.exclude_modules")).transpose()?;
        let wanted = |(layer, site): &(usize, Site)| {
            let path = site.path(*layer);
            !exclude.as_ref().is_some_and(|exclude| exclude.matches(&path))
                && self.layers.is_none_or(|layers| layers.contains(layer))
                && include.matches(&path)
        };
        Ok(base.linears().filter(wanted).collect())
    }

    /// The chosen modules outside of the layers; none beside `layers_to_transform`, as in PEFT.
    pub fn ends(&self) -> Result<Vec<Site>, SpecError> {
        let include = self.include.matcher("adapter.target_modules")?;
        let exclude = self.exclude.map(|targets| targets.matcher("adapter.exclude_modules")).transpose()?;
        let wanted = |site: &Site| {
            let path = site.module();
            self.layers.is_none()
                && !exclude.as_ref().is_some_and(|exclude| exclude.matches(path))
                && include.matches(path)
        };
        Ok(ENDS.into_iter().filter(wanted).collect())
    }

    /// Refuses what matches nothing, by the field at fault; only linears of the layers are matched.
    pub fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        self.check_with(base, &[])
    }

    /// The same for a method that can also change the modules `ends`.
    pub fn check_with(&self, base: &BaseInfo, ends: &[Site]) -> Result<(), SpecError> {
        self.include.check_with(base, "adapter.target_modules", ends)?;
        self.check_layers(base)?;
        if self.linears(base)?.is_empty() && (ends.is_empty() || self.ends()?.is_empty()) {
            return Err(no_match("adapter.target_modules", "what exclude_modules and layers_to_transform leave", base));
        }
        Ok(())
    }

    fn check_layers(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let param = "adapter.layers_to_transform";
        let Some(layers) = self.layers else { return Ok(()) };
        if let Some(layer) = layers.iter().find(|layer| **layer >= base.layers) {
            return Err(out_of_range(param, layer, &format!("below the {} layers of {}", base.layers, base.id)));
        }
        match self.include {
            Targets::Pattern(text) if text != ALL_LINEAR => {
                let message = "layers_to_transform cannot stand beside a regular expression in target_modules";
                Err(SpecError::new(param, "spec_conflict", message))
            }
            _ => Ok(()),
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
            Matcher::AllLinear => ENDS.iter().all(|site| site.module() != path),
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

pub(super) fn names_module(name: &str, path: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// A regular expression over a module's whole path.
pub fn whole(text: &str, param: &str) -> Result<Regex, SpecError> {
    compile(&format!("^(?:{text})$"), text, param)
}

fn compile(pattern: &str, text: &str, param: &str) -> Result<Regex, SpecError> {
    Regex::new(pattern).map_err(|error| {
        // The crate's message spans lines; its last one says what is wrong.
        let reason = error.to_string().lines().last().unwrap_or_default().trim().to_owned();
        SpecError::new(param, "spec_invalid_pattern", format!("{text} is not a regular expression: {reason}"))
    })
}

/// `layers_to_transform` is one number or a list.
pub fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<usize>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a layer's number or a list of them")]
    enum Layers {
        One(usize),
        Many(Vec<usize>),
    }
    Ok(Option::<Layers>::deserialize(deserializer)?.map(|layers| match layers {
        Layers::One(layer) => vec![layer],
        Layers::Many(layers) => layers,
    }))
}
