//! X-LoRA's knobs, in PEFT's names (Buehler and Buehler, arXiv 2402.07148).

use serde::{Deserialize, Serialize};

use super::{
    Card, Knobs, LoraSpec, SpecError,
    read::{out_of_range, positive},
};
use crate::domain::{BaseInfo, Site};

const MOST_EXPERTS: usize = 64;
const MOST_LAYERS: usize = 8;
const MOST_WIDTH: usize = 8192;
const LARGEST_WEIGHT: f64 = 100.0;

/// A gate over finished LoRA adapters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct XloraSpec {
    /// Tuned models of the same base, by name.
    pub adapters: Vec<String>,
    /// What these are: found by the server, no part of a request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<XloraExpert>,
    pub enable_softmax: bool,
    /// A softmax over what `top_k_lora` leaves.
    pub enable_softmax_topk: bool,
    pub softmax_temperature: f64,
    /// Weights of their own for each linear; else one for all.
    pub layerwise_scalings: bool,
    pub top_k_lora: Option<usize>,
    /// Linears of the classifier.
    pub xlora_depth: usize,
    /// Its width between them.
    pub xlora_size: usize,
    pub xlora_dropout_p: f64,
    /// Trains the experts as well; they are copies, the adapters stay as they are.
    pub use_trainable_adapters: bool,
    /// What each expert counts in the pass whose hidden rows the classifier reads.
    pub scaling_pass_value: f64,
    pub global_scaling_weight: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct XloraExpert {
    /// The adapter that it is a copy of; none once an X-LoRA adapter holds its tensors.
    pub generation: Option<String>,
    pub lora: LoraSpec,
}

impl Default for XloraSpec {
    fn default() -> Self {
        Self {
            adapters: Vec::new(),
            experts: Vec::new(),
            enable_softmax: true,
            enable_softmax_topk: false,
            softmax_temperature: 1.0,
            layerwise_scalings: false,
            top_k_lora: None,
            xlora_depth: 1,
            xlora_size: 2048,
            xlora_dropout_p: 0.2,
            use_trainable_adapters: false,
            scaling_pass_value: 0.0,
            global_scaling_weight: 1.0,
        }
    }
}

impl Knobs for XloraSpec {
    /// A classifier begins from nothing; experts are finished.
    fn learning_rate(&self) -> f64 {
        if self.use_trainable_adapters { 2e-4 } else { 1e-3 }
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let n = self.adapters.len();
        if !(2..=MOST_EXPERTS).contains(&n) {
            let message = format!("adapter.adapters names {n} models; it must be 2 to {MOST_EXPERTS}");
            return Err(SpecError::new("adapter.adapters", "spec_out_of_range", message));
        }
        if let Some(twice) = self.adapters.iter().enumerate().find(|(i, name)| self.adapters[..*i].contains(name)) {
            let message = format!("adapter.adapters names {} twice", twice.1);
            return Err(SpecError::new("adapter.adapters", "spec_conflict", message));
        }
        self.check_weights(n)?;
        if !(1..=MOST_LAYERS).contains(&self.xlora_depth) {
            return Err(out_of_range("adapter.xlora_depth", self.xlora_depth, &format!("1 to {MOST_LAYERS}")));
        }
        if !(1..=MOST_WIDTH).contains(&self.xlora_size) {
            return Err(out_of_range("adapter.xlora_size", self.xlora_size, &format!("1 to {MOST_WIDTH}")));
        }
        if !(0.0..1.0).contains(&self.xlora_dropout_p) {
            return Err(out_of_range("adapter.xlora_dropout_p", self.xlora_dropout_p, "at least 0 and below 1"));
        }
        if !self.experts.is_empty() && self.experts.len() != n {
            let message = format!("there are {} experts for {n} adapters", self.experts.len());
            return Err(SpecError::new("adapter.adapters", "spec_conflict", message));
        }
        self.experts.iter().try_for_each(|expert| expert.check(base))
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let classifier: usize = self.classifier(base).iter().map(|[outputs, inputs]| outputs * (inputs + 1)).sum();
        let experts = self.experts.iter().filter(|_| self.use_trainable_adapters);
        classifier as u64 + experts.map(|expert| expert.lora.trainable(base)).sum::<u64>()
    }

    fn card(&self) -> Card {
        Card {
            definition: "A classifier over finished LoRA adapters: from the hidden rows of a first pass it gives each \
                         expert a weight λ for each token, y = x Wᵀ + Σ λ_e · (alpha_e / r_e) · B_e A_e x \
                         (arXiv 2402.07148).",
            choose_when: "Adapters for single tasks are there, and requests mix these tasks.",
            avoid_when: "Answers have to come fast, or there is one task.",
            inference_overhead: "Two passes, two caches, and every expert's matrices for each token.",
            mergeable: false,
            file_format: "XLORA",
        }
    }

    fn sources(&self) -> Vec<&str> {
        self.experts.iter().filter_map(|expert| expert.generation.as_deref()).collect()
    }
}

impl XloraExpert {
    /// Only linears of the layers can be gated.
    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let refused = |what: &str| {
            let message = format!("an expert changes {what}; experts of X-LoRA change linears of the layers only");
            Err(SpecError::new("adapter.adapters", "spec_unsupported", message))
        };
        if self.lora.modules_to_save.is_some() {
            return refused("modules_to_save");
        }
        if self.lora.trainable_token_indices.is_some() {
            return refused("trainable_token_indices");
        }
        match self.lora.targets(base)?.iter().find(|target| !Site::LAYER.contains(&target.site)) {
            Some(target) => refused(target.site.module()),
            None => Ok(()),
        }
    }
}

impl XloraSpec {
    fn check_weights(&self, experts: usize) -> Result<(), SpecError> {
        positive("adapter.softmax_temperature", self.softmax_temperature)?;
        match self.top_k_lora {
            Some(k) if !(1..=experts).contains(&k) => {
                return Err(out_of_range("adapter.top_k_lora", k, &format!("1 to {experts}, the number of adapters")));
            }
            None if self.enable_softmax_topk => {
                let message = "enable_softmax_topk is a softmax over the best top_k_lora experts: say how many";
                return Err(SpecError::new("adapter.top_k_lora", "spec_conflict", message));
            }
            Some(_) if self.scaling_pass_value != 0.0 => {
                let message = "with top_k_lora, the first pass would choose among experts that count the same: \
                               scaling_pass_value must be 0";
                return Err(SpecError::new("adapter.scaling_pass_value", "spec_conflict", message));
            }
            _ => {}
        }
        let weights =
            [("scaling_pass_value", self.scaling_pass_value), ("global_scaling_weight", self.global_scaling_weight)];
        match weights.iter().find(|(_, weight)| weight.is_nan() || weight.abs() > LARGEST_WEIGHT) {
            Some((name, weight)) => {
                let limits = format!("at most {LARGEST_WEIGHT} in size");
                Err(out_of_range(&format!("adapter.{name}"), weight, &limits))
            }
            None => Ok(()),
        }
    }

    /// The linears that any expert changes, in the order of the forward pass.
    pub fn linears(&self, base: &BaseInfo) -> Vec<(usize, Site)> {
        let targets = self.experts.iter().filter_map(|expert| expert.lora.targets(base).ok()).flatten();
        let mut linears: Vec<(usize, Site)> = targets.map(|target| (target.layer, target.site)).collect();
        linears.sort_unstable_by_key(|(layer, site)| (*layer, *site as usize));
        linears.dedup();
        linears
    }

    /// Weights that the classifier gives a token.
    pub fn scalings(&self, base: &BaseInfo) -> usize {
        self.adapters.len() * if self.layerwise_scalings { self.linears(base).len() } else { 1 }
    }

    /// `[out, in]` of the classifier's linears.
    pub fn classifier(&self, base: &BaseInfo) -> Vec<[usize; 2]> {
        let inner = std::iter::repeat_n(self.xlora_size, self.xlora_depth - 1);
        let widths: Vec<usize> = [base.hidden].into_iter().chain(inner).chain([self.scalings(base)]).collect();
        widths.windows(2).map(|pair| [pair[1], pair[0]]).collect()
    }
}
