//! Parts of the base that are trained as they are, beside any method: full copies of modules (PEFT's
//! `modules_to_save`) and rows of the embedding (`trainable_token_indices`; a tied output layer has the same rows).
//! Both hold values, not increments, and begin as the base's own.

use candle_core::{Device, Result as Candle, Tensor};

use super::MethodError;
use crate::{
    domain::{BaseInfo, LoraSpec, Norm, Site, spec::SavedModule},
    model::{Base, Linear},
};

const TOKENS: &str = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";

/// What a spec saves.
pub struct Choice {
    modules: Vec<SavedModule>,
    tokens: Vec<u32>,
    tied: bool,
}

impl Choice {
    pub fn of(spec: &LoraSpec, base: &BaseInfo) -> Result<Self, MethodError> {
        let modules = spec.saved(base).map_err(|error| MethodError::Mismatch(error.to_string()))?;
        let tokens = spec.trainable_token_indices.clone().unwrap_or_default();
        if let Some(token) = tokens.iter().find(|token| **token as usize >= base.vocab) {
            let message = format!("trainable_token_indices: {token} is outside the vocabulary of {}", base.vocab);
            return Err(MethodError::Mismatch(message));
        }
        Ok(Self { modules, tokens, tied: base.tied })
    }

    pub fn is_empty(&self) -> bool {
        self.modules.is_empty() && self.tokens.is_empty()
    }

    /// PEFT's names and the shapes: the modules in the order of the forward pass, then the tokens' rows.
    pub fn names(&self, base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
        let module = |module: &SavedModule| (file_name(*module), module.shape(base));
        let tokens = (!self.tokens.is_empty()).then(|| (TOKENS.to_owned(), vec![self.tokens.len(), base.hidden]));
        self.modules.iter().map(module).chain(tokens).collect()
    }

    /// The base's own values, in the order of the names.
    pub fn values(&self, base: &Base) -> Candle<Vec<Vec<f32>>> {
        let tokens = (!self.tokens.is_empty()).then(|| base.embed(&self.tokens)?.flatten_all()?.to_vec1());
        self.modules.iter().map(|module| of_base(*module, base)).chain(tokens).collect()
    }

    /// The trained tensors at their places; they stand in the order of the names.
    pub fn saved(&self, tensors: &[Tensor]) -> Saved {
        let mut saved = Saved { modules: Vec::new(), tokens: None, tied: self.tied };
        saved.modules.extend(self.modules.iter().copied().zip(tensors.iter().cloned()));
        if let Some(rows) = tensors.get(self.modules.len()) {
            saved.tokens = Some((self.tokens.clone(), rows.clone()));
        }
        saved
    }
}

/// A module's values in the base.
pub fn of_base(module: SavedModule, base: &Base) -> Candle<Vec<f32>> {
    match module {
        SavedModule::Embed => {
            let vocabulary: Vec<u32> = (0..base.info.vocab as u32).collect();
            base.embed(&vocabulary)?.flatten_all()?.to_vec1()
        }
        SavedModule::Head => base.linear(0, Site::Head).dequantize()?.flatten_all()?.to_vec1(),
        SavedModule::Norm(norm) => Ok(base.norm(norm).to_vec()),
    }
}

/// A saved module's tensor in PEFT's files.
fn file_name(module: SavedModule) -> String {
    format!("base_model.model.{}.weight", module.path())
}

/// The trained parts as the model sees them.
#[derive(Default)]
pub struct Saved {
    modules: Vec<(SavedModule, Tensor)>,
    tokens: Option<(Vec<u32>, Tensor)>,
    tied: bool,
}

impl Saved {
    /// Full copies of modules.
    pub fn of(modules: Vec<(SavedModule, Tensor)>) -> Self {
        Self { modules, ..Self::default() }
    }

    pub fn is_empty(&self) -> bool {
        self.modules.is_empty() && self.tokens.is_none()
    }

    pub fn module(&self, module: SavedModule) -> Option<&Tensor> {
        self.modules.iter().find(|(found, _)| *found == module).map(|(_, tensor)| tensor)
    }

    pub fn norm(&self, place: Norm) -> Option<Tensor> {
        self.module(SavedModule::Norm(place)).cloned()
    }

    /// Embeddings of some tokens; x: (n, hidden) are the base's
    pub fn embed(&self, ids: &[u32], x: Tensor) -> Candle<Tensor> {
        if let Some(rows) = self.module(SavedModule::Embed) {
            return rows.index_select(&Tensor::new(ids, &Device::Cpu)?, 0);
        }
        let Some((tokens, rows)) = &self.tokens else { return Ok(x) };
        let slots: Vec<Option<u32>> =
            ids.iter().map(|id| tokens.iter().position(|token| token == id).map(|slot| slot as u32)).collect();
        if slots.iter().all(Option::is_none) {
            return Ok(x);
        }
        let own: Vec<f32> = slots.iter().map(|slot| f32::from(u8::from(slot.is_some()))).collect();
        let own = Tensor::from_vec(own, (ids.len(), 1), &Device::Cpu)?;
        let chosen: Vec<u32> = slots.into_iter().map(Option::unwrap_or_default).collect();
        let trained = rows.index_select(&Tensor::new(chosen, &Device::Cpu)?, 0)?;
        x.broadcast_mul(&own.affine(-1.0, 1.0)?)? + trained.broadcast_mul(&own)?
    }

    /// The tensors of the output layer, none where it is the base's.
    pub fn head_parts(&self) -> Vec<Tensor> {
        let tied = self.tokens.as_ref().filter(|_| self.tied).map(|(_, rows)| rows);
        self.module(SavedModule::Head).or(tied).cloned().into_iter().collect()
    }

    /// Scores `(rows, vocab)`: of the full copy, or the base's with the trained tokens' columns.
    pub fn head_of(&self, part: &Tensor, x: &Tensor, base: &Linear) -> Candle<Tensor> {
        let device = x.device();
        let trained = x.matmul(&part.to_device(device)?.t()?)?;
        let Some((tokens, _)) = self.tokens.as_ref().filter(|_| self.module(SavedModule::Head).is_none()) else {
            return Ok(trained);
        };
        let vocab = base.shape().0;
        let (mut kept, mut places) = (vec![1f32; vocab], vec![0f32; tokens.len() * vocab]);
        for (slot, token) in tokens.iter().enumerate() {
            kept[*token as usize] = 0.0;
            places[slot * vocab + *token as usize] = 1.0;
        }
        let kept = base.forward(x)?.broadcast_mul(&Tensor::from_vec(kept, (1, vocab), device)?)?;
        kept + trained.matmul(&Tensor::from_vec(places, (tokens.len(), vocab), device)?)?
    }

    /// The merged weights of a module, by its path; none where it is the base's.
    pub fn merged(&self, path: &str, weight: &Tensor) -> Candle<Option<Tensor>> {
        if let Some((_, tensor)) = self.modules.iter().find(|(module, _)| module.path() == path) {
            return Ok(Some(tensor.clone()));
        }
        let has_rows = path == Site::Embed.module() || (self.tied && path == Site::Head.module());
        let Some((tokens, rows)) = self.tokens.as_ref().filter(|_| has_rows) else { return Ok(None) };
        let mut values = weight.to_vec2::<f32>()?;
        for (token, row) in tokens.iter().zip(rows.to_vec2::<f32>()?) {
            values[*token as usize] = row;
        }
        Ok(Some(Tensor::new(values, &Device::Cpu)?))
    }
}
