//! Prefix tuning's knobs (Li and Liang, arXiv 2101.00190), with PEFT's names and meaning, and those of its preset
//! P-tuning v2 (Liu et al., arXiv 2110.07602).

use serde::{Deserialize, Serialize};

use super::{
    Card, Knobs, SpecError,
    prompt_tuning::{check_encoder_size, check_virtual_tokens},
};
use crate::domain::BaseInfo;

/// How the keys and values begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixInit {
    /// The base's own keys and values of tokens drawn from the vocabulary.
    SampleVocab,
    /// Normal with deviation 1, PEFT's way; with a projection, the network's own first values.
    Random,
    /// Zero: not the base itself, because zero keys draw attention too.
    Zero,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixTuningSpec {
    pub num_virtual_tokens: usize,
    /// A network of two layers makes the rows while they are trained.
    pub prefix_projection: bool,
    /// Of that network. Null is the width of the base's keys.
    pub encoder_hidden_size: Option<usize>,
    /// Null is `sample_vocab`, with a projection `random`.
    pub init_weights: Option<PrefixInit>,
}

impl Default for PrefixTuningSpec {
    fn default() -> Self {
        Self { num_virtual_tokens: 20, prefix_projection: false, encoder_hidden_size: None, init_weights: None }
    }
}

impl Knobs for PrefixTuningSpec {
    fn learning_rate(&self) -> f64 {
        if self.prefix_projection { 1e-3 } else { 1e-2 }
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        check_virtual_tokens(self.num_virtual_tokens, base)?;
        check_encoder_size(self.encoder_hidden_size, base)?;
        let conflict = |param: &str, message: &str| Err(SpecError::new(param, "spec_conflict", message));
        match (self.prefix_projection, self.init_weights) {
            (false, _) if self.encoder_hidden_size.is_some() => conflict(
                "adapter.encoder_hidden_size",
                "encoder_hidden_size is the width of prefix_projection's network",
            ),
            (true, Some(PrefixInit::SampleVocab)) => {
                conflict("adapter.init_weights", "prefix_projection begins as random or zero, not as sample_vocab")
            }
            _ => Ok(()),
        }
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let (p, kv, width) = (self.num_virtual_tokens, kv(base), 2 * base.layers * kv(base));
        let e = self.hidden_size(base);
        (if self.prefix_projection { p * kv + (kv + 1) * e + (e + 1) * width } else { p * width }) as u64
    }

    fn virtual_tokens(&self) -> usize {
        self.num_virtual_tokens
    }

    fn card(&self) -> Card {
        Card {
            definition: "P trained keys and values before those of the text in every layer (arXiv 2101.00190), each by \
                         itself or made by a small network (prefix_projection).",
            choose_when: "The style of what is written matters, data is scarce, and prompts may cost no more work in \
                          the linears.",
            avoid_when: "The texts fill the context, or the adapter has to be merged.",
            inference_overhead: "P more keys and values in each layer's attention; none in the linears.",
            mergeable: false,
            file_format: "PREFIX_TUNING",
        }
    }
}

impl PrefixTuningSpec {
    pub fn hidden_size(&self, base: &BaseInfo) -> usize {
        self.encoder_hidden_size.unwrap_or(kv(base))
    }

    pub fn init(&self) -> PrefixInit {
        let own = if self.prefix_projection { PrefixInit::Random } else { PrefixInit::SampleVocab };
        self.init_weights.unwrap_or(own)
    }

    /// What is left of a finished adapter: its keys and values.
    pub fn flat(&self) -> Self {
        Self { prefix_projection: false, ..self.clone() }.without_idle()
    }

    /// PEFT keeps the width of a network that is not there.
    pub fn without_idle(self) -> Self {
        let encoder_hidden_size = self.encoder_hidden_size.filter(|_| self.prefix_projection);
        Self { encoder_hidden_size, ..self }
    }
}

fn kv(base: &BaseInfo) -> usize {
    base.kv_heads * base.head_dim
}

/// Prefix tuning without projection and with more virtual tokens, as its paper has it for harder tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PTuningV2Spec(pub PrefixTuningSpec);

impl Default for PTuningV2Spec {
    fn default() -> Self {
        Self(PrefixTuningSpec { num_virtual_tokens: 64, ..PrefixTuningSpec::default() })
    }
}

impl Knobs for PTuningV2Spec {
    fn learning_rate(&self) -> f64 {
        self.0.learning_rate()
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        self.0.check(base)
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        self.0.trainable(base)
    }

    fn virtual_tokens(&self) -> usize {
        self.0.virtual_tokens()
    }

    fn card(&self) -> Card {
        Card {
            definition: "Deep prompts: prefix tuning without projection and with more virtual tokens (arXiv 2110.07602); \
                         its files are prefix tuning's.",
            choose_when: "Prompts have to do what weights would: harder tasks, middle-sized bases.",
            ..self.0.card()
        }
    }
}
