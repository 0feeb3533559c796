//! `modules_to_save` and `trainable_token_indices`: parts of the base that are trained as they are.

use serde::{Deserialize, Serialize};

use super::{SpecError, read::out_of_range, targets::names_module};
use crate::domain::{BaseInfo, Norm, Site};

/// A module that can be trained as a full copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedModule {
    /// The output layer.
    Head,
    /// The token embedding.
    Embed,
    Norm(Norm),
}

impl SavedModule {
    /// Every module of a base that can be saved, in the order of the forward pass.
    pub fn all(base: &BaseInfo) -> impl Iterator<Item = Self> {
        let has_head_norms = base.architecture == "qwen3";
        let norms = move |layer| {
            let heads = [Norm::Query(layer), Norm::Key(layer)].into_iter().filter(move |_| has_head_norms);
            [Norm::Attention(layer)].into_iter().chain(heads).chain([Norm::Mlp(layer)])
        };
        let layers = (0..base.layers).flat_map(norms).chain([Norm::Final]).map(SavedModule::Norm);
        [SavedModule::Embed].into_iter().chain(layers).chain([SavedModule::Head])
    }

    pub fn path(self) -> String {
        match self {
            SavedModule::Head => Site::Head.module().to_owned(),
            SavedModule::Embed => Site::Embed.module().to_owned(),
            SavedModule::Norm(norm) => norm.path(),
        }
    }

    pub fn shape(self, base: &BaseInfo) -> Vec<usize> {
        match self {
            SavedModule::Head | SavedModule::Embed => vec![base.vocab, base.hidden],
            SavedModule::Norm(Norm::Query(_) | Norm::Key(_)) => vec![base.head_dim],
            SavedModule::Norm(_) => vec![base.hidden],
        }
    }
}

/// The modules that names stand for. PEFT matches by a bare end of the path: a name that would catch more there than
/// it says (`norm`, which is the end of `input_layernorm`) is refused.
pub fn modules(names: &[String], base: &BaseInfo) -> Result<Vec<SavedModule>, SpecError> {
    let param = "adapter.modules_to_save";
    for name in names {
        let by_end = SavedModule::all(base).filter(|module| module.path().ends_with(name.as_str())).count();
        let by_name = SavedModule::all(base).filter(|module| names_module(name, &module.path())).count();
        if name.is_empty() || by_name == 0 {
            let message = format!(
                "{name} is no module of {} that can be saved; those are lm_head, embed_tokens, model.norm, \
                 input_layernorm and post_attention_layernorm",
                base.id
            );
            return Err(SpecError::new(param, "spec_no_match", message));
        }
        if by_end != by_name {
            let message = format!("{name} is also the end of other modules' names; write the whole path: model.{name}");
            return Err(SpecError::new(param, "spec_ambiguous", message));
        }
    }
    let wanted = |module: &SavedModule| names.iter().any(|name| names_module(name, &module.path()));
    Ok(SavedModule::all(base).filter(wanted).collect())
}

/// Tokens of which rows are trained: in the vocabulary, each once.
pub fn check_tokens(tokens: &[u32], base: &BaseInfo) -> Result<(), SpecError> {
    let param = "adapter.trainable_token_indices";
    if let Some(token) = tokens.iter().find(|token| **token as usize >= base.vocab) {
        return Err(out_of_range(param, token, &format!("below the vocabulary of {}", base.vocab)));
    }
    let distinct: std::collections::BTreeSet<&u32> = tokens.iter().collect();
    if distinct.len() != tokens.len() || tokens.is_empty() {
        return Err(SpecError::new(param, "spec_given_twice", format!("{param} is empty or names a token twice")));
    }
    Ok(())
}
