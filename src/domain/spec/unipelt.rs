//! UniPELT's knobs (Mao et al., arXiv 2110.07577).

use serde::{Deserialize, Serialize};

use super::{Card, Knobs, SpecError, read::out_of_range};
use crate::domain::{BaseInfo, Site};

/// Over which positions a gate is averaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateMode {
    /// Each token has gates of its own: causal, and the same while training and while generating.
    #[default]
    Token,
    /// The mean over the prompt.
    PromptMean,
    /// The mean over the whole text, as in the paper's encoders and in AdapterHub: only where a head judges the text.
    SequenceMean,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnipeltSpec {
    /// Rank of the changes to the query and value products.
    pub lora_r: usize,
    /// Virtual keys and values before each row.
    pub prefix_length: usize,
    /// Width of the network that makes the prefix.
    pub bottleneck_size: usize,
    /// The bottleneck behind the feed-forward block is `hidden / reduction_factor` wide.
    pub reduction_factor: usize,
    pub gate_mode: GateMode,
}

impl Default for UnipeltSpec {
    fn default() -> Self {
        Self {
            lora_r: 8,
            prefix_length: 10,
            bottleneck_size: 512,
            reduction_factor: 16,
            gate_mode: GateMode::default(),
        }
    }
}

impl UnipeltSpec {
    /// The bottleneck's width.
    pub fn width(&self, base: &BaseInfo) -> usize {
        base.hidden / self.reduction_factor.max(1)
    }

    /// Numbers that one virtual row has: keys and values of every layer.
    pub fn prefix_width(base: &BaseInfo) -> usize {
        2 * base.layers * base.kv_heads * base.head_dim
    }
}

impl Knobs for UnipeltSpec {
    fn learning_rate(&self) -> f64 {
        5e-4
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let rank = [Site::Q, Site::V].map(|site| base.shape(site)).into_iter().flat_map(|(o, i)| [o, i]).min();
        let within = |name: &str, value: usize, most: usize| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(out_of_range(&format!("adapter.{name}"), value, &format!("1 to {most}"))),
        };
        within("lora_r", self.lora_r, rank.unwrap_or_default())?;
        within("prefix_length", self.prefix_length, base.context / 2)?;
        within("bottleneck_size", self.bottleneck_size, 8192)?;
        within("reduction_factor", self.reduction_factor, base.hidden)?;
        match self.gate_mode {
            GateMode::Token | GateMode::SequenceMean => Ok(()),
            GateMode::PromptMean => Err(SpecError::new(
                "adapter.gate_mode",
                "spec_unsupported",
                "prompt_mean needs the whole prompt before its first token is computed, and prompts are read in pieces; \
                 gate_mode must be token, or sequence_mean where a head judges the text",
            )),
        }
    }

    fn sees_ahead(&self) -> Option<&'static str> {
        (self.gate_mode == GateMode::SequenceMean).then_some("gate_mode")
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let (h, width) = (base.hidden, self.width(base));
        let gate = h + 1;
        let lora: usize = [Site::Q, Site::V]
            .map(|site| {
                let (outputs, inputs) = base.shape(site);
                self.lora_r * (outputs + inputs) + gate
            })
            .iter()
            .sum();
        let bottleneck = width * h + width + h * width + h + gate;
        let m = self.bottleneck_size;
        let prefix = self.prefix_length * h + m * h + m + Self::prefix_width(base) * (m + 1);
        (base.layers * (lora + gate + bottleneck) + prefix) as u64
    }

    fn card(&self) -> Card {
        Card {
            definition: "Three gated changes in each layer: low-rank q and v, q += σ(w·x + b) · B A x; a prefix of keys \
                         and values scaled by σ(w·x + b); a bottleneck behind the feed-forward block, \
                         u + σ(w·u + b) · (W_up ReLU(W_down u)) (arXiv 2110.07577), with gates for each token; for \
                         heads of texts also with their means (gate_mode sequence_mean).",
            choose_when: "There are few examples, and it is not known which of LoRA, prefix and bottleneck suits them.",
            avoid_when: "Data are plentiful (LoRA is cheaper), or the result has to be merged into the base.",
            inference_overhead: "A prefix in the attention of every layer, a bottleneck and four gates a token.",
            mergeable: false,
            file_format: "UNIPELT",
        }
    }
}
