//! (IA)³'s knobs (Liu et al., arXiv 2205.05638), with PEFT's names and meaning.

use regex::Regex;
use serde::{Deserialize, Serialize};

use super::{
    Card, Knobs, SpecError,
    targets::{Selection, Targets, no_match, whole},
};
use crate::domain::{BaseInfo, Site};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ia3Spec {
    /// Null takes PEFT's choice for the base's family.
    pub target_modules: Option<Targets>,
    pub exclude_modules: Option<Targets>,
    /// The targets whose input is scaled instead of their output; null is `down_proj`.
    pub feedforward_modules: Option<Targets>,
}

/// One linear that is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ia3Target {
    pub layer: usize,
    pub site: Site,
    /// Whether its input is scaled, not its output.
    pub is_feedforward: bool,
}

impl Knobs for Ia3Spec {
    fn learning_rate(&self) -> f64 {
        3e-3
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let chosen = self.chosen(base);
        selection(&chosen, self.exclude_modules.as_ref()).check(base)?;
        let param = "adapter.feedforward_modules";
        let Some(feedforward) = &self.feedforward_modules else { return Ok(()) };
        if let (Targets::Names(inputs), Targets::Names(all)) = (feedforward, &chosen)
            && let Some(name) = inputs.iter().find(|name| !all.contains(name))
        {
            let message = format!("{name} is in feedforward_modules and not in target_modules");
            return Err(SpecError::new(param, "spec_conflict", message));
        }
        let is_empty = matches!(feedforward, Targets::Names(names) if names.is_empty());
        match feedforward {
            Targets::Pattern(text) if !self.targets(base)?.iter().any(|target| target.is_feedforward) => {
                Err(no_match(param, text, base))
            }
            Targets::Names(names) if !is_empty => {
                let targets = self.targets(base)?;
                let missed = names.iter().find(|name| !targets.iter().any(|t| t.site.path(t.layer).ends_with(*name)));
                missed.map_or(Ok(()), |name| Err(no_match(param, name, base)))
            }
            _ => Ok(()),
        }
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        self.targets(base).map_or(0, |targets| targets.iter().map(|target| target.width(base) as u64).sum())
    }

    fn card(&self) -> Card {
        Card {
            definition: "One learned factor for each output of the targeted attention linears, y = l ⊙ (x Wᵀ + b), \
                         and for each input of the feed-forward ones, y = (l ⊙ x) Wᵀ + b (arXiv 2205.05638).",
            choose_when: "Few examples, or thousands of tenants: an adapter is a few kilobytes.",
            avoid_when: "The behaviour has to change much.",
            inference_overhead: "One multiplication for each scaled number; none once merged.",
            mergeable: true,
            file_format: "IA3",
        }
    }

    fn fit(&mut self, base: &BaseInfo, _steps: u64) -> Result<(), SpecError> {
        self.target_modules = Some(self.chosen(base));
        self.feedforward_modules.get_or_insert_with(|| Targets::Names(vec!["down_proj".to_owned()]));
        Ok(())
    }
}

impl Ia3Target {
    /// The length of `l`.
    pub fn width(&self, base: &BaseInfo) -> usize {
        let (outputs, inputs) = base.shape(self.site);
        if self.is_feedforward { inputs } else { outputs }
    }
}

impl Ia3Spec {
    /// The linears that are scaled, in the order of the forward pass.
    pub fn targets(&self, base: &BaseInfo) -> Result<Vec<Ia3Target>, SpecError> {
        let chosen = self.chosen(base);
        let linears = selection(&chosen, self.exclude_modules.as_ref()).linears(base)?;
        let inputs = Inputs::of(self.feedforward_modules.as_ref())?;
        let target =
            |(layer, site): (usize, Site)| Ia3Target { layer, site, is_feedforward: inputs.has(&site.path(layer)) };
        Ok(linears.into_iter().map(target).collect())
    }

    /// `target_modules`, or PEFT's choice for the family (`peft/utils/constants.py`).
    fn chosen(&self, base: &BaseInfo) -> Targets {
        let first = match base.architecture.as_str() {
            family if family.starts_with("qwen") || family.starts_with("gemma") => "q_proj",
            _ => "k_proj",
        };
        let names = || Targets::Names([first, "v_proj", "down_proj"].map(str::to_owned).to_vec());
        self.target_modules.clone().unwrap_or_else(names)
    }
}

fn selection<'a>(include: &'a Targets, exclude: Option<&'a Targets>) -> Selection<'a> {
    Selection { include, exclude, layers: None }
}

/// `feedforward_modules`. PEFT compares its names with the ends of paths, without a dot before them.
enum Inputs<'a> {
    Ends(&'a [String]),
    Regex(Regex),
    Down,
}

impl<'a> Inputs<'a> {
    fn of(modules: Option<&'a Targets>) -> Result<Self, SpecError> {
        Ok(match modules {
            None => Inputs::Down,
            Some(Targets::Names(names)) => Inputs::Ends(names),
            Some(Targets::Pattern(text)) => Inputs::Regex(whole(text, "adapter.feedforward_modules")?),
        })
    }

    fn has(&self, path: &str) -> bool {
        match self {
            Inputs::Ends(names) => names.iter().any(|name| path.ends_with(name.as_str())),
            Inputs::Regex(regex) => regex.is_match(path),
            Inputs::Down => path.ends_with("down_proj"),
        }
    }
}
