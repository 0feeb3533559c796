//! LoRA's knobs (Hu et al., arXiv 2106.09685; rsLoRA, arXiv 2312.03732), with PEFT's names and meaning.

use indexmap::IndexMap;
use regex::Regex;
use serde::{Deserialize, Serialize};

use super::{
    Card, Knobs, SavedModule, SpecError,
    read::{out_of_range, positive},
    saved,
    targets::{Selection, Targets, no_match, suffix},
};
use crate::domain::{BaseInfo, Site};

/// How A and B begin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false, \"gaussian\", \"pissa\" or \"pissa_niter_K\" (K from 0 to 64)")]
pub enum LoraInit {
    /// `true`: A uniform in ±1/√in, B zero. `false`: B random as well (for tests of the arithmetic).
    Flag(bool),
    Named(LoraInitName),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum LoraInitName {
    /// `"gaussian"`: A normal with deviation 1/r, B zero.
    Gaussian,
    /// `"pissa"`: the principal part of W (arXiv 2404.02948), by an exact decomposition.
    Pissa,
    /// `"pissa_niter_4"`: the same by that many rounds of randomised subspace iteration.
    PissaNiter(usize),
}

impl TryFrom<String> for LoraInitName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let rounds = || name.strip_prefix("pissa_niter_")?.parse().ok().filter(|rounds| *rounds <= 64);
        match name.as_str() {
            "gaussian" => Ok(LoraInitName::Gaussian),
            "pissa" => Ok(LoraInitName::Pissa),
            _ => rounds().map(LoraInitName::PissaNiter).ok_or_else(|| format!("unknown start {name}")),
        }
    }
}

impl From<LoraInitName> for String {
    fn from(name: LoraInitName) -> String {
        match name {
            LoraInitName::Gaussian => "gaussian".to_owned(),
            LoraInitName::Pissa => "pissa".to_owned(),
            LoraInitName::PissaNiter(rounds) => format!("pissa_niter_{rounds}"),
        }
    }
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
    /// Modules that are trained as full copies: `lm_head`, `embed_tokens`, norms.
    pub modules_to_save: Option<Vec<String>>,
    /// Tokens whose rows of the embedding are trained; a tied output layer follows.
    pub trainable_token_indices: Option<Vec<u32>>,
    /// LoRA+ (arXiv 2402.12354): how many times faster B learns than A. No part of the files, so an adapter that is
    /// continued learns as plain LoRA.
    pub loraplus_lr_ratio: Option<f64>,
    /// LoRA+'s learning rate of the embedding's A and B, not a multiple of the run's.
    pub loraplus_lr_embedding: f64,
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
            modules_to_save: None,
            trainable_token_indices: None,
            loraplus_lr_ratio: None,
            loraplus_lr_embedding: 1e-6,
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
        if !(0.0..=1.0).contains(&self.loraplus_lr_embedding) {
            return Err(out_of_range("adapter.loraplus_lr_embedding", self.loraplus_lr_embedding, "0 to 1"));
        }
        self.selection().check_with(base, &[Site::Embed, Site::Head])?;
        self.check_saved(base)?;
        let targets = self.targets(base)?;
        self.check_patterns(base, &targets)?;
        self.check_init(base, &targets)?;
        targets.iter().try_for_each(|target| self.check_rank(base, target))
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let values = |target: &LoraTarget| {
            let (outputs, inputs) = base.shape(target.site);
            target.r as u64 * (outputs + inputs) as u64
        };
        let saved = self.saved(base).unwrap_or_default();
        let saved: u64 = saved.iter().map(|module| module.shape(base).iter().product::<usize>() as u64).sum();
        let tokens = self.trainable_token_indices.as_ref().map_or(0, |tokens| tokens.len() * base.hidden);
        saved + tokens as u64 + self.targets(base).map_or(0, |targets| targets.iter().map(values).sum())
    }

    fn head_field(&self, base: &BaseInfo) -> Option<&'static str> {
        let is_target = self.selection().ends().is_ok_and(|ends| ends.contains(&Site::Head));
        let is_saved = || self.saved(base).is_ok_and(|saved| saved.contains(&SavedModule::Head));
        if is_target { Some("target_modules") } else { is_saved().then_some("modules_to_save") }
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

    /// The modules that are trained as full copies.
    pub fn saved(&self, base: &BaseInfo) -> Result<Vec<SavedModule>, SpecError> {
        saved::modules(self.modules_to_save.as_deref().unwrap_or_default(), base)
    }

    /// A module is changed in one way.
    fn check_saved(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let (saved, ends) = (self.saved(base)?, self.selection().ends()?);
        let is_embedded = ends.contains(&Site::Embed) || self.trainable_token_indices.is_some();
        if base.architecture.starts_with("gemma") && (is_embedded || !saved.is_empty()) {
            // Its embedding is scaled and its norms are stored as w − 1.
            let message =
                format!("embedding and norms of {} cannot be trained; linears and lm_head can", base.architecture);
            return Err(SpecError::new("adapter.modules_to_save", "spec_unsupported", message));
        }
        if let Some(tokens) = &self.trainable_token_indices {
            saved::check_tokens(tokens, base)?;
            let twice = saved.contains(&SavedModule::Embed) || ends.contains(&Site::Embed);
            if twice || (base.tied && (saved.contains(&SavedModule::Head) || ends.contains(&Site::Head))) {
                let message = "trainable_token_indices cannot stand beside another change of the same embedding";
                return Err(SpecError::new("adapter.trainable_token_indices", "spec_conflict", message));
            }
        }
        // PEFT passes over targets that are saved; here one of the two fields has to go.
        let twice = |site: &&Site| saved.iter().any(|module| module.path() == site.module());
        match ends.iter().find(twice) {
            None => Ok(()),
            Some(site) => {
                let message = format!("{} is also in target_modules", site.module());
                Err(SpecError::new("adapter.modules_to_save", "spec_conflict", message))
            }
        }
    }

    /// The modules that are changed: the layers' in the order of the forward pass, then embedding and output layer.
    pub fn targets(&self, base: &BaseInfo) -> Result<Vec<LoraTarget>, SpecError> {
        let ranks = patterns(&self.rank_pattern, "adapter.rank_pattern")?;
        let alphas = patterns(&self.alpha_pattern, "adapter.alpha_pattern")?;
        let selection = self.selection();
        // The ends of the model count as the layer behind the last.
        let ends = selection.ends()?.into_iter().map(|site| (base.layers, site));
        let targets = selection.linears(base)?.into_iter().chain(ends).map(|(layer, site)| {
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

    /// Whether A and B begin as the principal part of W.
    pub fn is_pissa(&self) -> bool {
        matches!(self.init_lora_weights, LoraInit::Named(LoraInitName::Pissa | LoraInitName::PissaNiter(_)))
    }

    /// PiSSA's result is stored as LoRA of twice the rank, which has to fit, and to exist.
    fn check_init(&self, base: &BaseInfo, targets: &[LoraTarget]) -> Result<(), SpecError> {
        let param = "adapter.init_lora_weights";
        if !self.is_pissa() {
            return Ok(());
        }
        if self.use_rslora && !(self.rank_pattern.is_empty() && self.alpha_pattern.is_empty()) {
            let message = "with use_rslora, pissa cannot stand beside rank_pattern or alpha_pattern: \
                           its result would be no LoRA file";
            return Err(SpecError::new(param, "spec_conflict", message));
        }
        let least = |target: &&LoraTarget| {
            let (outputs, inputs) = base.shape(target.site);
            2 * target.r > outputs.min(inputs)
        };
        if targets.iter().any(|target| target.site == Site::Embed) {
            let message = "embed_tokens cannot begin as pissa: its A and B have a start of their own";
            return Err(SpecError::new(param, "spec_conflict", message));
        }
        match targets.iter().find(least) {
            None => Ok(()),
            Some(target) => {
                let path = target.site.path(target.layer);
                let message =
                    format!("pissa is stored with twice its rank, and 2 · {} is more than {path} has", target.r);
                Err(SpecError::new("adapter.r", "spec_out_of_range", message))
            }
        }
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
