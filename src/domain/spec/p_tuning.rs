//! P-tuning's knobs (Liu et al., arXiv 2103.10385), with PEFT's names and meaning.

use serde::{Deserialize, Serialize};

use super::{
    Card, Knobs, PromptTuningSpec, SpecError,
    prompt_tuning::{check_encoder_size, check_virtual_tokens},
    read::out_of_range,
};
use crate::domain::BaseInfo;

/// What makes the rows while they are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Reparameterization {
    #[default]
    Mlp,
    Lstm,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PTuningSpec {
    pub num_virtual_tokens: usize,
    pub encoder_reparameterization_type: Reparameterization,
    /// Null is the base's width.
    pub encoder_hidden_size: Option<usize>,
    /// Of the LSTM.
    pub encoder_num_layers: usize,
    /// Between the layers of the LSTM.
    pub encoder_dropout: f64,
}

/// Layers of an MLP (PEFT's default), and of an LSTM when none are asked for.
const LAYERS: usize = 2;
const MOST_LAYERS: usize = 8;

impl Default for PTuningSpec {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            encoder_reparameterization_type: Reparameterization::default(),
            encoder_hidden_size: None,
            encoder_num_layers: LAYERS,
            encoder_dropout: 0.0,
        }
    }
}

impl Knobs for PTuningSpec {
    fn learning_rate(&self) -> f64 {
        1e-3
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        check_virtual_tokens(self.num_virtual_tokens, base)?;
        check_encoder_size(self.encoder_hidden_size, base)?;
        if !(1..=MOST_LAYERS).contains(&self.encoder_num_layers) {
            let limits = format!("1 to {MOST_LAYERS}");
            return Err(out_of_range("adapter.encoder_num_layers", self.encoder_num_layers, &limits));
        }
        if !(0.0..1.0).contains(&self.encoder_dropout) {
            return Err(out_of_range("adapter.encoder_dropout", self.encoder_dropout, "at least 0 and below 1"));
        }
        let conflict = |param: &str, message: &str| Err(SpecError::new(param, "spec_conflict", message));
        match self.encoder_reparameterization_type {
            Reparameterization::Mlp if self.encoder_num_layers != LAYERS => conflict(
                "adapter.encoder_num_layers",
                "the MLP always has the same layers: leave encoder_num_layers out",
            ),
            Reparameterization::Mlp if self.encoder_dropout > 0.0 => {
                conflict("adapter.encoder_dropout", "the MLP has no dropout: leave encoder_dropout out")
            }
            Reparameterization::Lstm if self.encoder_num_layers == 1 && self.encoder_dropout > 0.0 => {
                conflict("adapter.encoder_dropout", "dropout stands between the LSTM's layers, and there is one only")
            }
            _ => Ok(()),
        }
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let linear = |inputs: usize, outputs: usize| (inputs + 1) * outputs;
        let (h, e) = (base.hidden, self.hidden_size(base));
        let network = match self.encoder_reparameterization_type {
            Reparameterization::Mlp => linear(h, e) + linear(e, e) + linear(e, h),
            Reparameterization::Lstm => {
                let layer = |inputs: usize| 2 * (linear(inputs, 4 * e) + linear(e, 4 * e));
                let lstm = layer(h) + (self.encoder_num_layers - 1) * layer(2 * e);
                lstm + linear(2 * e, 2 * e) + linear(2 * e, h)
            }
        };
        (self.num_virtual_tokens * h + network) as u64
    }

    fn virtual_tokens(&self) -> usize {
        self.num_virtual_tokens
    }

    fn card(&self) -> Card {
        Card {
            definition: "Prompt tuning whose rows Z = f(E) come from a small MLP or LSTM while they are trained \
                         (arXiv 2103.10385); only Z is stored.",
            choose_when: "Prompt tuning does not get off the ground: few labels, a small base.",
            avoid_when: "The adapter will be trained further: a finished one goes on as plain prompt tuning.",
            inference_overhead: "P more tokens to read and to keep in the cache, once a sequence.",
            mergeable: false,
            file_format: "P_TUNING",
        }
    }
}

impl PTuningSpec {
    pub fn hidden_size(&self, base: &BaseInfo) -> usize {
        self.encoder_hidden_size.unwrap_or(base.hidden)
    }
}

/// What is left of a finished adapter: its rows.
impl From<&PTuningSpec> for PromptTuningSpec {
    fn from(spec: &PTuningSpec) -> Self {
        Self { num_virtual_tokens: spec.num_virtual_tokens, ..Self::default() }
    }
}
