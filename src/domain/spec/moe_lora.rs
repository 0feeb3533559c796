//! The knobs of mixtures of low-rank experts: MixLoRA (Li et al., arXiv 2404.15159), MoLA (Gao et al., arXiv
//! 2402.08562), LoRAMoE (Dou et al., arXiv 2312.09979) and AdaMoLE (Liu and Luo, arXiv 2405.00361).

use serde::{Deserialize, Serialize};

use super::{
    Card, Knobs, SpecError,
    read::{out_of_range, positive},
    targets::{ALL_LINEAR, Selection, Targets},
};
use crate::domain::{BaseInfo, Site};

/// Experts of one linear, at most.
const MOST_EXPERTS: usize = 64;
/// Trained tensors of one adapter, at most: what a checkpoint's header has room for.
const MOST_TENSORS: usize = 20_000;

/// Where experts stand and how a token chooses among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MoeVariant {
    /// One router a feed-forward block, whose experts are whole blocks; plain LoRA on attention; the best `top_k`.
    #[default]
    MixLora,
    /// A router and experts in every linear, as many as its layer has; the best `top_k`.
    Mola,
    /// A router and experts in every linear; all experts, by their probabilities.
    LoraMoe,
    /// A router, a learnt threshold and experts in every linear; the experts above the threshold.
    AdaMole,
}

impl MoeVariant {
    pub fn name(self) -> &'static str {
        match self {
            MoeVariant::MixLora => "mixlora",
            MoeVariant::Mola => "mola",
            MoeVariant::LoraMoe => "loramoe",
            MoeVariant::AdaMole => "adamole",
        }
    }
}

/// A knob that is null belongs to another variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MoeLoraSpec {
    pub variant: MoeVariant,
    /// Null with `experts_per_layer`.
    pub num_experts: Option<usize>,
    /// MoLA: experts of each layer, or of each run of as many layers as make the list fit (`[2, 4, 6, 8]` by quarters).
    pub experts_per_layer: Option<Vec<usize>>,
    pub top_k: Option<usize>,
    pub r: usize,
    #[serde(alias = "alpha")]
    pub lora_alpha: f64,
    #[serde(alias = "dropout")]
    pub lora_dropout: f64,
    pub target_modules: Option<Targets>,
    /// Weight of the balance loss `E · Σ f_e P_e`, averaged over routers.
    pub router_aux_loss_coef: Option<f64>,
    /// Deviation of the router's first values; null is uniform in ±1/√in.
    pub router_init_range: Option<f64>,
    /// While training, the router sees its input times numbers in 1 ± this.
    pub jitter_noise: f64,
    /// AdaMoLE: what the threshold stays below.
    pub max_threshold: Option<f64>,
    /// LoRAMoE: weight of the localised balance, the squared coefficient of variation of the experts' loads by row.
    pub blc_weight: Option<f64>,
    /// LoRAMoE: how much an expert's load counts more where its type is that of the row. Rows have no type: 0.
    pub blc_alpha: Option<f64>,
}

impl Default for MoeLoraSpec {
    fn default() -> Self {
        Self {
            variant: MoeVariant::default(),
            num_experts: None,
            experts_per_layer: None,
            top_k: None,
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: None,
            router_aux_loss_coef: None,
            router_init_range: None,
            jitter_noise: 0.0,
            max_threshold: None,
            blc_weight: None,
            blc_alpha: None,
        }
    }
}

impl Knobs for MoeLoraSpec {
    fn aliases() -> super::read::Aliases {
        &[("alpha", "lora_alpha"), ("dropout", "lora_dropout")]
    }

    fn learning_rate(&self) -> f64 {
        2e-4
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        self.check_variant()?;
        self.check_experts(base)?;
        self.check_router()?;
        positive("adapter.lora_alpha", self.lora_alpha)?;
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(out_of_range("adapter.lora_dropout", self.lora_dropout, "at least 0 and below 1"));
        }
        self.chosen().check(base, "adapter.target_modules")?;
        let sites = self.targets(base)?;
        if self.variant == MoeVariant::MixLora && self.blocks(&sites).is_empty() {
            let message =
                "mixlora's experts are feed-forward blocks: target_modules needs gate_proj, up_proj or down_proj";
            return Err(SpecError::new("adapter.target_modules", "spec_no_match", message));
        }
        let tensors: usize = sites.iter().map(|(layer, _)| 2 * self.experts(*layer, base) + 3).sum();
        if tensors > MOST_TENSORS {
            let param = if self.num_experts.is_some() { "adapter.num_experts" } else { "adapter.experts_per_layer" };
            let message = format!(
                "experts beside {} linears are {tensors} tensors, above the limit of {MOST_TENSORS}; take fewer experts \
                 or targets",
                sites.len()
            );
            return Err(SpecError::new(param, "spec_out_of_range", message));
        }
        let limit = |(layer, site): &(usize, Site)| {
            let (outputs, inputs) = base.shape(*site);
            (outputs.min(inputs), site.path(*layer))
        };
        match sites.iter().map(limit).min() {
            Some((limit, path)) if !(1..=limit).contains(&self.r) => {
                Err(out_of_range("adapter.r", self.r, &format!("1 to {limit}, the smaller side of {path}")))
            }
            _ => Ok(()),
        }
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let Ok(sites) = self.targets(base) else { return 0 };
        let values = |(layer, site): &(usize, Site)| {
            let (outputs, inputs) = base.shape(*site);
            let (pair, experts) = (self.r * (outputs + inputs), self.experts(*layer, base));
            match self.variant {
                MoeVariant::MixLora if is_feed_forward(*site) => experts * pair,
                MoeVariant::MixLora => pair,
                MoeVariant::Mola | MoeVariant::LoraMoe => experts * (pair + inputs),
                MoeVariant::AdaMole => experts * (pair + inputs) + inputs + 1,
            }
        };
        let routers = self.blocks(&sites).len() * self.experts(0, base) * base.hidden;
        (sites.iter().map(values).sum::<usize>() + routers) as u64
    }

    fn card(&self) -> Card {
        Card {
            definition: "Low-rank experts with a router p = softmax(x W_gᵀ): y = x Wᵀ + Σ w_e · (alpha / r) · B_e A_e x. \
                         mixlora (arXiv 2404.15159) mixes whole feed-forward blocks by the top_k of p, mola \
                         (arXiv 2402.08562) mixes each linear by them, loramoe (arXiv 2312.09979) by all of p, adamole \
                         (arXiv 2405.00361) by those above a learnt threshold.",
            choose_when: "The data hold several tasks or styles that pull one adapter in different directions.",
            avoid_when: "The data are small or of one kind, or the result has to be merged into the base.",
            inference_overhead: "The router and the chosen experts of each token; never merged. mixlora also \
                                 multiplies the feed-forward's activation for each chosen expert.",
            mergeable: false,
            file_format: "MIXLORA, MOLA, LORAMOE or ADAMOLE, by variant",
        }
    }
}

pub fn is_feed_forward(site: Site) -> bool {
    matches!(site, Site::Gate | Site::Up | Site::Down)
}

impl MoeLoraSpec {
    /// With the variant's own defaults filled in.
    pub fn resolved(mut self) -> Self {
        use MoeVariant::*;
        let experts = if self.variant == AdaMole { 4 } else { 8 };
        if self.experts_per_layer.is_none() {
            self.num_experts = self.num_experts.or(Some(experts));
        }
        if matches!(self.variant, MixLora | Mola) {
            self.top_k = self.top_k.or(Some(2));
        }
        match self.variant {
            LoraMoe => {
                self.blc_weight = self.blc_weight.or(Some(0.0));
                self.blc_alpha = self.blc_alpha.or(Some(0.0));
            }
            _ => self.router_aux_loss_coef = self.router_aux_loss_coef.or(Some(1e-3)),
        }
        if self.variant == MixLora {
            self.router_init_range = self.router_init_range.or(Some(0.02));
        }
        if self.variant == AdaMole {
            self.max_threshold = self.max_threshold.or(self.num_experts.map(|experts| 1.0 / experts as f64));
        }
        self.target_modules = Some(self.chosen());
        self
    }

    /// What is targeted, with the variant's default.
    pub fn chosen(&self) -> Targets {
        let feed_forward = || Targets::Names(["gate_proj", "up_proj", "down_proj"].map(str::to_owned).to_vec());
        self.target_modules.clone().unwrap_or_else(|| match self.variant {
            MoeVariant::LoraMoe => feed_forward(),
            _ => Targets::Pattern(ALL_LINEAR.to_owned()),
        })
    }

    /// The linears that are changed, in the order of the forward pass.
    pub fn targets(&self, base: &BaseInfo) -> Result<Vec<(usize, Site)>, SpecError> {
        Selection { include: &self.chosen(), exclude: None, layers: None }.linears(base)
    }

    /// Layers whose feed-forward block is a mixture (MixLoRA).
    pub fn blocks(&self, sites: &[(usize, Site)]) -> Vec<usize> {
        let mixed = sites.iter().filter(|(_, site)| self.variant == MoeVariant::MixLora && is_feed_forward(*site));
        let mut layers: Vec<usize> = mixed.map(|(layer, _)| *layer).collect();
        layers.dedup();
        layers
    }

    /// Experts of a layer's linears.
    pub fn experts(&self, layer: usize, base: &BaseInfo) -> usize {
        match &self.experts_per_layer {
            Some(list) => list.get(layer * list.len() / base.layers).copied().unwrap_or_default(),
            None => self.num_experts.unwrap_or_default(),
        }
    }

    /// Each knob stands with its variants only.
    fn check_variant(&self) -> Result<(), SpecError> {
        use MoeVariant::*;
        let owners: [(&str, bool, &[MoeVariant]); 6] = [
            ("top_k", self.top_k.is_some(), &[MixLora, Mola]),
            ("experts_per_layer", self.experts_per_layer.is_some(), &[Mola]),
            ("router_aux_loss_coef", self.router_aux_loss_coef.is_some(), &[MixLora, Mola, AdaMole]),
            ("max_threshold", self.max_threshold.is_some(), &[AdaMole]),
            ("blc_weight", self.blc_weight.is_some(), &[LoraMoe]),
            ("blc_alpha", self.blc_alpha.is_some(), &[LoraMoe]),
        ];
        match owners.iter().find(|(_, given, variants)| *given && !variants.contains(&self.variant)) {
            None => Ok(()),
            Some((name, _, variants)) => {
                let variants: Vec<&str> = variants.iter().map(|variant| variant.name()).collect();
                let message =
                    format!("{name} is a knob of {}, not of the variant {}", variants.join(", "), self.variant.name());
                Err(SpecError::new(format!("adapter.{name}"), "spec_conflict", message))
            }
        }
    }

    fn check_experts(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let limits = format!("2 to {MOST_EXPERTS}");
        let fits = |experts: usize| (2..=MOST_EXPERTS).contains(&experts);
        match (self.num_experts, &self.experts_per_layer) {
            (Some(_), Some(_)) => {
                let message = "num_experts and experts_per_layer are both given: the second says it layer by layer";
                return Err(SpecError::new("adapter.num_experts", "spec_conflict", message));
            }
            (None, Some(list)) => {
                let param = "adapter.experts_per_layer";
                if list.is_empty() || !base.layers.is_multiple_of(list.len()) {
                    let limits = format!("a number that divides the {} layers of {}", base.layers, base.id);
                    return Err(out_of_range(param, format!("a list of {}", list.len()), &limits));
                }
                if let Some(experts) = list.iter().find(|experts| !fits(**experts)) {
                    return Err(out_of_range(param, experts, &limits));
                }
            }
            (experts, None) => {
                let experts = experts.unwrap_or_default();
                if !fits(experts) {
                    return Err(out_of_range("adapter.num_experts", experts, &limits));
                }
            }
        }
        let least = (0..base.layers).map(|layer| self.experts(layer, base)).min().unwrap_or_default();
        match self.top_k {
            // A single expert would always weigh 1, and its router would learn nothing from the loss.
            Some(k) if !(2..=least).contains(&k) => {
                Err(out_of_range("adapter.top_k", k, &format!("2 to {least}, the least number of experts")))
            }
            _ => Ok(()),
        }
    }

    fn check_router(&self) -> Result<(), SpecError> {
        let share = |name: &str, value: Option<f64>| match value {
            Some(value) if !(0.0..=1.0).contains(&value) => {
                Err(out_of_range(&format!("adapter.{name}"), value, "0 to 1"))
            }
            _ => Ok(()),
        };
        share("router_aux_loss_coef", self.router_aux_loss_coef)?;
        share("blc_weight", self.blc_weight)?;
        if !(0.0..1.0).contains(&self.jitter_noise) {
            return Err(out_of_range("adapter.jitter_noise", self.jitter_noise, "at least 0 and below 1"));
        }
        if let Some(range) = self.router_init_range.filter(|range| !(*range > 0.0 && *range <= 1.0)) {
            return Err(out_of_range("adapter.router_init_range", range, "above 0 and at most 1"));
        }
        let most = 1.0 / self.num_experts.unwrap_or(1) as f64;
        if let Some(threshold) = self.max_threshold.filter(|threshold| !(*threshold > 0.0 && *threshold <= most)) {
            let limits = format!("above 0 and at most {most}, so that one expert is always above it");
            return Err(out_of_range("adapter.max_threshold", threshold, &limits));
        }
        match self.blc_alpha {
            Some(alpha) if alpha != 0.0 => {
                let message = "blc_alpha weighs experts by the task type of each row, which rows do not carry; it must \
                               be 0, and blc_weight alone balances the experts";
                Err(SpecError::new("adapter.blc_alpha", "spec_unsupported", message))
            }
            _ => Ok(()),
        }
    }
}
