//! AdaLoRA's knobs (Zhang et al., arXiv 2303.10512), with PEFT's names and meaning.

use serde::{Deserialize, Serialize};

use super::{
    Card, Knobs, SpecError,
    read::{out_of_range, positive},
    targets::{ALL_LINEAR, Selection, Targets},
};
use crate::domain::{BaseInfo, Site};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdaLoraSpec {
    /// The rank that every module begins with.
    pub init_r: usize,
    /// The mean rank at the end.
    pub target_r: usize,
    /// Steps before the first pruning; null is a tenth of the run.
    pub tinit: Option<u64>,
    /// Steps after the last pruning; null is three tenths of the run.
    pub tfinal: Option<u64>,
    /// Steps between prunings.
    #[serde(rename = "deltaT")]
    pub delta_t: u64,
    /// How slowly importance changes.
    pub beta1: f64,
    /// How slowly its uncertainty changes.
    pub beta2: f64,
    pub orth_reg_weight: f64,
    #[serde(alias = "alpha")]
    pub lora_alpha: f64,
    #[serde(alias = "dropout")]
    pub lora_dropout: f64,
    pub target_modules: Targets,
    pub exclude_modules: Option<Targets>,
    /// Only these decoder layers.
    #[serde(deserialize_with = "super::targets::one_or_many")]
    pub layers_to_transform: Option<Vec<usize>>,
}

impl Default for AdaLoraSpec {
    fn default() -> Self {
        Self {
            init_r: 12,
            target_r: 8,
            tinit: None,
            tfinal: None,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: Targets::Pattern(ALL_LINEAR.to_owned()),
            exclude_modules: None,
            layers_to_transform: None,
        }
    }
}

/// When ranks are pruned, in optimiser steps from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    pub tinit: u64,
    pub tfinal: u64,
    pub delta_t: u64,
    pub total_steps: u64,
}

impl Budget {
    /// The step that prunes for the last time.
    pub fn last(&self) -> u64 {
        self.total_steps - self.tfinal
    }

    pub fn prunes_after(&self, step: u64) -> bool {
        step == self.last() || (self.tinit < step && step < self.last() && step.is_multiple_of(self.delta_t))
    }

    /// How many of `first` triplets stay when a step prunes: it falls as the cube of what is left of the pruning,
    /// down to `last`.
    pub fn left(&self, step: u64, first: usize, last: usize) -> usize {
        let done = (step - self.tinit) as f64 / (self.last() - self.tinit) as f64;
        ((first - last) as f64 * (1.0 - done).powf(3.0) + last as f64) as usize
    }
}

impl Knobs for AdaLoraSpec {
    fn aliases() -> super::read::Aliases {
        &[("alpha", "lora_alpha"), ("dropout", "lora_dropout")]
    }

    fn learning_rate(&self) -> f64 {
        1e-3
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        if self.target_r == 0 {
            return Err(out_of_range("adapter.target_r", 0, "at least 1"));
        }
        if self.init_r <= self.target_r {
            let limit = format!("above target_r, which is {}: it is pruned down to that", self.target_r);
            return Err(out_of_range("adapter.init_r", self.init_r, &limit));
        }
        if self.delta_t == 0 {
            return Err(out_of_range("adapter.deltaT", 0, "at least 1"));
        }
        for (param, beta) in [("adapter.beta1", self.beta1), ("adapter.beta2", self.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return Err(out_of_range(param, beta, "above 0 and below 1"));
            }
        }
        if !(self.orth_reg_weight.is_finite() && self.orth_reg_weight >= 0.0) {
            return Err(out_of_range("adapter.orth_reg_weight", self.orth_reg_weight, "at least 0"));
        }
        positive("adapter.lora_alpha", self.lora_alpha)?;
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(out_of_range("adapter.lora_dropout", self.lora_dropout, "at least 0 and below 1"));
        }
        self.selection().check(base)?;
        self.targets(base)?.into_iter().try_for_each(|(layer, site)| {
            let (outputs, inputs) = base.shape(site);
            let limit = outputs.min(inputs);
            let message = format!("init_r {} is above the limit of {limit} of {}", self.init_r, site.path(layer));
            if self.init_r <= limit {
                Ok(())
            } else {
                Err(SpecError::new("adapter.init_r", "spec_out_of_range", message))
            }
        })
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let values = |(_, site): (usize, Site)| {
            let (outputs, inputs) = base.shape(site);
            self.init_r as u64 * (outputs + inputs + 1) as u64
        };
        self.targets(base).map_or(0, |targets| targets.into_iter().map(values).sum())
    }

    fn card(&self) -> Card {
        Card {
            definition: "Triplets of singular value and vectors beside each targeted linear, y = x Wᵀ + \
                         (alpha / init_r) · (x (A ⊙ E)ᵀ) Bᵀ; the least important are pruned while training, so that \
                         modules get different ranks (arXiv 2303.10512).",
            choose_when: "You want the smallest adapter for its quality, and the run has hundreds of steps.",
            avoid_when: "Short runs: there is no time to find out which ranks matter.",
            inference_overhead: "As LoRA at the ranks that are left; none once merged.",
            mergeable: true,
            file_format: "ADALORA",
        }
    }

    fn fit(&mut self, _base: &BaseInfo, steps: u64) -> Result<(), SpecError> {
        let budget = self.budget(steps)?;
        (self.tinit, self.tfinal) = (Some(budget.tinit), Some(budget.tfinal));
        Ok(())
    }
}

impl AdaLoraSpec {
    fn selection(&self) -> Selection<'_> {
        Selection {
            include: &self.target_modules,
            exclude: self.exclude_modules.as_ref(),
            layers: self.layers_to_transform.as_deref(),
        }
    }

    /// The linears that are changed, in the order of the forward pass.
    pub fn targets(&self, base: &BaseInfo) -> Result<Vec<(usize, Site)>, SpecError> {
        self.selection().linears(base)
    }

    /// The plan for a run of this many steps; there must be a step between `tinit` and `tfinal`.
    pub fn budget(&self, total_steps: u64) -> Result<Budget, SpecError> {
        if self.tfinal == Some(0) {
            let limit = "at least 1: the ranks are settled that many steps before the end";
            return Err(out_of_range("adapter.tfinal", 0, limit));
        }
        let tinit = self.tinit.unwrap_or(total_steps / 10);
        let tfinal = self.tfinal.unwrap_or((total_steps * 3 / 10).max(1));
        if tinit.checked_add(tfinal).is_some_and(|ends| ends < total_steps) {
            return Ok(Budget { tinit, tfinal, delta_t: self.delta_t, total_steps });
        }
        let param = match (self.tinit, self.tfinal) {
            (_, Some(_)) => "adapter.tfinal",
            (Some(_), None) => "adapter.tinit",
            (None, None) => "adapter.type",
        };
        let message = format!(
            "adalora has no step to prune after: tinit {tinit} and tfinal {tfinal} leave none of the run's {total_steps}"
        );
        Err(SpecError::new(param, "spec_out_of_range", message))
    }
}
