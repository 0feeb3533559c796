//! Prompt tuning's knobs (Lester et al., arXiv 2104.08691), with PEFT's names and meaning.

use serde::{Deserialize, Serialize};

use super::{Card, Knobs, SpecError, read::out_of_range};
use crate::domain::BaseInfo;

/// How the rows begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptInit {
    /// Normal with deviation 1: far from any token of most bases.
    Random,
    /// Embeddings of tokens drawn from the vocabulary. The default, because small models need it.
    #[default]
    SampleVocab,
    /// Embeddings of `prompt_tuning_init_text`, cut or repeated to the number of virtual tokens.
    Text,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PromptTuningSpec {
    pub num_virtual_tokens: usize,
    pub prompt_tuning_init: PromptInit,
    pub prompt_tuning_init_text: Option<String>,
}

impl Default for PromptTuningSpec {
    fn default() -> Self {
        Self { num_virtual_tokens: 20, prompt_tuning_init: PromptInit::default(), prompt_tuning_init_text: None }
    }
}

impl Knobs for PromptTuningSpec {
    fn learning_rate(&self) -> f64 {
        1e-2
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        check_virtual_tokens(self.num_virtual_tokens, base)?;
        let param = "adapter.prompt_tuning_init_text";
        match (self.prompt_tuning_init, &self.prompt_tuning_init_text) {
            (PromptInit::Text, text) if text.as_ref().is_none_or(String::is_empty) => {
                let message =
                    "prompt_tuning_init TEXT begins with the words of prompt_tuning_init_text, which has none";
                Err(SpecError::new(param, "spec_missing", message))
            }
            (PromptInit::Random | PromptInit::SampleVocab, Some(_)) => {
                let message = "prompt_tuning_init_text is only read when prompt_tuning_init is TEXT";
                Err(SpecError::new(param, "spec_conflict", message))
            }
            _ => Ok(()),
        }
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        (self.num_virtual_tokens * base.hidden) as u64
    }

    fn virtual_tokens(&self) -> usize {
        self.num_virtual_tokens
    }

    fn card(&self) -> Card {
        Card {
            definition: "Trained embeddings Z (P, hidden) before those of the text: X' = [Z; E(ids)] \
                         (arXiv 2104.08691).",
            choose_when: "Many tenants need adapters of a few kilobytes, and the base is large.",
            avoid_when: "The base is small, or the texts fill the context.",
            inference_overhead: "P more tokens to read and to keep in the cache, once a sequence.",
            mergeable: false,
            file_format: "PROMPT_TUNING",
        }
    }
}

/// Wide enough for every use, and a number that fits memory.
pub(super) fn check_encoder_size(size: Option<usize>, base: &BaseInfo) -> Result<(), SpecError> {
    let most = 4 * base.hidden;
    match size.filter(|size| !(1..=most).contains(size)) {
        None => Ok(()),
        Some(size) => {
            let limits = format!("1 to {most}, four times the width of {}", base.id);
            Err(out_of_range("adapter.encoder_hidden_size", size, &limits))
        }
    }
}

/// At least one; and the text keeps half of the context.
pub(super) fn check_virtual_tokens(tokens: usize, base: &BaseInfo) -> Result<(), SpecError> {
    let most = base.context / 2;
    if (1..=most).contains(&tokens) {
        return Ok(());
    }
    let limits = format!("1 to {most}, half of the context of {}", base.id);
    Err(out_of_range("adapter.num_virtual_tokens", tokens, &limits))
}
