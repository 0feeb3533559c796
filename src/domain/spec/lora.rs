//! LoRA's knobs (Hu et al., arXiv 2106.09685; rsLoRA, arXiv 2312.03732), with PEFT's names and meaning.

use indexmap::IndexMap;
use regex::Regex;
use serde::{Deserialize, Serialize};

use super::{
    Card, Knobs, SpecError,
    read::{out_of_range, positive},
    targets::{Selection, Targets, no_match, suffix},
};
use crate::domain::{BaseInfo, Site};

/// How A and B begin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"gaussian\"")]
pub enum LoraInit {
    /// `true`: A uniform in ±1/√in, B zero. `false`: B random as well (for tests of the arithmetic).
    Flag(bool),
    /// `"gaussian"`: A normal with deviation 1/r, B zero.
    Named(LoraInitName),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraInitName {
    Gaussian,
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
    pub init_lora_weights: LoraInit,
    /// Other ranks for modules whose path matches the key, first match wins.
    pub rank_pattern: IndexMap<String, usize>,
    pub alpha_pattern: IndexMap<String, f64>,
    /// Only these decoder layers.
    #[serde(deserialize_with = "super::targets::one_or_many")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// LoRA+ (arXiv 2402.12354): how many times faster B learns than A. No part of the files, so an adapter that is
    /// continued learns as plain LoRA.
    pub loraplus_lr_ratio: Option<f64>,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: Targets::Pattern(super::targets::ALL_LINEAR.to_owned()),
            exclude_modules: None,
            use_rslora: false,
            init_lora_weights: LoraInit::Flag(true),
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            layers_to_transform: None,
            loraplus_lr_ratio: None,
        }
    }
}

/// One linear that LoRA changes, with everything resolved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraTarget {
    pub layer: usize,
    pub site: Site,
    pub r: usize,
    pub alpha: f64,
    /// alpha/r, or alpha/√r.
    pub scale: f64,
}

impl Knobs for LoraSpec {
    fn aliases() -> super::read::Aliases {
        &[("alpha", "lora_alpha"), ("dropout", "lora_dropout")]
    }

    /// LoRA+ wants about half of LoRA's.
    fn learning_rate(&self) -> f64 {
        if self.loraplus_lr_ratio.is_some() { 1e-4 } else { 2e-4 }
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        if self.r == 0 {
            return Err(out_of_range("adapter.r", self.r, "at least 1"));
        }
        positive("adapter.lora_alpha", self.lora_alpha)?;
        for alpha in self.alpha_pattern.values() {
            positive("adapter.alpha_pattern", *alpha)?;
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(out_of_range("adapter.lora_dropout", self.lora_dropout, "at least 0 and below 1"));
        }
        if let Some(ratio) = self.loraplus_lr_ratio.filter(|ratio| !(1.0..=1000.0).contains(ratio)) {
            return Err(out_of_range("adapter.loraplus_lr_ratio", ratio, "1 to 1000"));
        }
        self.selection().check(base)?;
        let targets = self.targets(base)?;
        self.check_patterns(base, &targets)?;
        targets.iter().try_for_each(|target| self.check_rank(base, target))
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let values = |target: &LoraTarget| {
            let (outputs, inputs) = base.shape(target.site);
            target.r as u64 * (outputs + inputs) as u64
        };
        self.targets(base).map_or(0, |targets| targets.iter().map(values).sum())
    }

    fn card(&self) -> Card {
        Card {
            definition: "Two low-rank matrices beside each targeted linear: y = x Wᵀ + (alpha / r) · (x Aᵀ) Bᵀ \
                         (arXiv 2106.09685); with use_rslora the scale is alpha / √r (arXiv 2312.03732).",
            choose_when: "You have demonstrations and want the best quality for its cost. The default.",
            avoid_when: "Thousands of tenants need adapters of a few kilobytes.",
            inference_overhead: "2r (in + out) multiplications a token and linear; none once merged.",
            mergeable: true,
            file_format: "LORA",
        }
    }
}

impl LoraSpec {
    fn selection(&self) -> Selection<'_> {
        Selection {
            include: &self.target_modules,
            exclude: self.exclude_modules.as_ref(),
            layers: self.layers_to_transform.as_deref(),
        }
    }

    /// The linears that are changed, in the order of the forward pass.
    pub fn targets(&self, base: &BaseInfo) -> Result<Vec<LoraTarget>, SpecError> {
        let ranks = patterns(&self.rank_pattern, "adapter.rank_pattern")?;
        let alphas = patterns(&self.alpha_pattern, "adapter.alpha_pattern")?;
        let targets = self.selection().linears(base)?.into_iter().map(|(layer, site)| {
            let path = site.path(layer);
            let r = first(&ranks, &path).unwrap_or(self.r);
            let alpha = first(&alphas, &path).unwrap_or(self.lora_alpha);
            let divisor = if self.use_rslora { (r as f64).sqrt() } else { r as f64 };
            LoraTarget { layer, site, r, alpha, scale: alpha / divisor }
        });
        Ok(targets.collect())
    }

    /// Every key must say something about a targeted module.
    fn check_patterns(&self, base: &BaseInfo, targets: &[LoraTarget]) -> Result<(), SpecError> {
        let paths: Vec<String> = targets.iter().map(|target| target.site.path(target.layer)).collect();
        let ranks = self.rank_pattern.keys().map(|key| ("adapter.rank_pattern", key));
        let alphas = self.alpha_pattern.keys().map(|key| ("adapter.alpha_pattern", key));
        for (param, key) in ranks.chain(alphas) {
            let regex = suffix(key, param)?;
            if !paths.iter().any(|path| regex.is_match(path)) {
                return Err(no_match(param, key, base));
            }
        }
        Ok(())
    }

    fn check_rank(&self, base: &BaseInfo, target: &LoraTarget) -> Result<(), SpecError> {
        let (outputs, inputs) = base.shape(target.site);
        let limit = outputs.min(inputs);
        if (1..=limit).contains(&target.r) {
            return Ok(());
        }
        let param = if target.r == self.r { "adapter.r" } else { "adapter.rank_pattern" };
        let side =
            if target.r == 0 { "below the least of 1".to_owned() } else { format!("above the limit of {limit}") };
        let message = format!("rank {} is {side} of {}", target.r, target.site.path(target.layer));
        Err(SpecError::new(param, "spec_out_of_range", message))
    }
}

fn patterns<T: Copy>(map: &IndexMap<String, T>, param: &str) -> Result<Vec<(Regex, T)>, SpecError> {
    map.iter().map(|(key, value)| Ok((suffix(key, param)?, *value))).collect()
}

fn first<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns.iter().find(|(regex, _)| regex.is_match(path)).map(|(_, value)| *value)
}
