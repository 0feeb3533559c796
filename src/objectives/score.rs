//! Log-probabilities of texts, token by token. An objective is a function of them in double precision; its slopes,
//! written by hand, go back into the graph as the tokens' weights.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};

use super::{Models, laid::Laid};
use crate::{
    data::Example,
    model::{Base, Hook, Keep, Tape},
};

/// What one model says of some texts.
pub struct Scored {
    /// `log p` of each text's trained tokens.
    pub texts: Vec<Vec<f64>>,
    /// Trained tokens that are the argmax.
    pub correct: usize,
    /// All of them, with gradients.
    values: Tensor,
}

impl Scored {
    /// The sum over each text's trained tokens.
    pub fn sums(&self) -> Vec<f64> {
        self.texts.iter().map(|text| text.iter().sum()).collect()
    }

    /// `Σ weight · log p`, with gradients; a weight for each trained token of each text.
    pub fn weighted(&self, weights: &[Vec<f64>]) -> Result<Tensor> {
        let weights: Vec<f32> = weights.iter().flatten().map(|weight| *weight as f32).collect();
        (&self.values * Tensor::new(weights, &Device::Cpu)?)?.sum_all()
    }

    /// The same with one weight for each text.
    pub fn weighted_sums(&self, weights: &[f64]) -> Result<Tensor> {
        let each = self.texts.iter().zip(weights).map(|(text, weight)| vec![*weight; text.len()]);
        self.weighted(&each.collect::<Vec<_>>())
    }
}

/// Texts under the base with this adapter, or without one; dropout is off.
pub fn score(models: &Models, hook: Option<&Arc<dyn Hook>>, texts: &[&Example]) -> Result<Scored> {
    score_at(models, hook, texts, 1.0)
}

/// The same as numbers only: nothing is kept for a backward pass.
pub fn score_only(base: &Base, hook: Option<&Arc<dyn Hook>>, texts: &[&Example]) -> Result<Vec<f64>> {
    Ok(score_only_at(base, hook, texts, 1.0, None)?.log_probs.iter().map(|text| text.iter().sum()).collect())
}

/// Under scores divided by a temperature. Output layers have no bias, so that the hidden rows can be divided instead.
pub fn score_at(models: &Models, hook: Option<&Arc<dyn Hook>>, texts: &[&Example], temperature: f64) -> Result<Scored> {
    let laid = Laid::of(models.base, hook, texts);
    let hidden = models.forward(laid.batch(hook))?;
    read(models.base, hook, &laid, &hidden, temperature)
}

/// The same with a value head over the rows that the tokens are drawn from: `v = h w`, `(tokens)`, with gradients.
/// Values know no temperature.
pub fn score_with_values(
    models: &Models,
    hook: &Arc<dyn Hook>,
    texts: &[&Example],
    temperature: f64,
    head: &Tensor,
) -> Result<(Scored, Tensor)> {
    let laid = Laid::of(models.base, Some(hook), texts);
    let hidden = models.forward(laid.batch(Some(hook)))?;
    let scored = read(models.base, Some(hook), &laid, &hidden, temperature)?;
    Ok((scored, values(&hidden, &laid, head)?))
}

/// Numbers only, token by token.
#[derive(Clone, Debug, Default)]
pub struct Spoken {
    pub log_probs: Vec<Vec<f64>>,
    /// Empty without a value head.
    pub values: Vec<Vec<f64>>,
}

pub fn score_only_at(
    base: &Base,
    hook: Option<&Arc<dyn Hook>>,
    texts: &[&Example],
    temperature: f64,
    head: Option<&Var>,
) -> Result<Spoken> {
    let laid = Laid::of(base, hook, texts);
    let hidden = Tape::new(Keep::LayerInputs).forward(base, laid.batch(hook))?.detach();
    let log_probs = read(base, hook, &laid, &hidden, temperature)?.texts;
    let values = match head {
        Some(head) => split(texts, &values(&hidden, &laid, &head.as_detached_tensor())?)?,
        None => Vec::new(),
    };
    Ok(Spoken { log_probs, values })
}

fn values(hidden: &Tensor, laid: &Laid, head: &Tensor) -> Result<Tensor> {
    let rows: Vec<u32> = laid.targets.iter().map(|target| target.row as u32).collect();
    hidden.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?.matmul(&head.t()?)?.squeeze(1)
}

/// Numbers of all trained tokens, text by text.
pub fn split(texts: &[&Example], values: &Tensor) -> Result<Vec<Vec<f64>>> {
    let mut values = values.to_vec1::<f32>()?.into_iter().map(f64::from);
    Ok(texts.iter().map(|text| values.by_ref().take(text.trained()).collect()).collect())
}

fn read(base: &Base, hook: Option<&Arc<dyn Hook>>, laid: &Laid, hidden: &Tensor, temperature: f64) -> Result<Scored> {
    let hidden = if temperature == 1.0 { hidden.clone() } else { hidden.affine(1.0 / temperature, 0.0)? };
    let found = base.log_probs(&hidden, &laid.targets, hook.map(|hook| hook.as_ref()))?;
    Ok(Scored { texts: split(laid.texts, &found.values)?, correct: found.correct, values: found.values })
}

/// `log σ(x)` without overflow.
pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

pub fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}
