//! A model of what people prefer (Bradley and Terry; TRL's `reward_trainer.py`).
//!
//! `−log σ(r_c − r_r − margin) + c·(r_c + r_r)²`, `r` the score at a row's last token, the margin that of the row.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::{
    Figures, Found, Models, Objective, Term,
    preference::{pairs, texts},
    score::{log_sigmoid, sigmoid},
};
use crate::{
    data::{Example, Row},
    domain::spec::RewardModelSpec,
    model::{Batch, Hook, Sequence},
};

impl Objective for RewardModelSpec {
    /// Pairs.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        vec![rows.len() as f64]
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        let pairs = pairs(rows);
        let n = pairs.len();
        let hook = models.method.hook(None)?;
        let scores = scores(models, &hook, &texts(&pairs))?;
        let values: Vec<f64> = scores.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        let (mut value, mut slopes) = (0.0, vec![0f32; 2 * n]);
        let mut figures = Figures::default();
        for (i, pair) in pairs.iter().enumerate() {
            let sides = [values[i], values[n + i]];
            let (loss, slope) = softened(self, sides, pair.margin, pair.probability);
            value += loss;
            (slopes[i], slopes[n + i]) = (slope[0] as f32, slope[1] as f32);
            figures.add("rewards/chosen", sides[0]);
            figures.add("rewards/rejected", sides[1]);
            figures.add("rewards/accuracies", f64::from(u8::from(sides[0] > sides[1])));
        }
        let gradient = (scores * Tensor::new(slopes, &Device::Cpu)?)?.sum_all()?;
        Ok(Found { terms: vec![Term { value, gradient }], figures, hits: None, hook })
    }
}

/// The scores of texts, `(texts)`, with gradients; dropout is off.
fn scores(models: &Models, hook: &Arc<dyn Hook>, texts: &[&Example]) -> Result<Tensor> {
    let sequences =
        texts.iter().map(|text| Sequence { tokens: &text.ids, branches: &[], hook: Some(hook.clone()), cache: None });
    let hidden = models.forward(Batch { sequences: sequences.collect(), train: None })?;
    let ends = texts.iter().scan(0, |end, text| {
        *end += text.ids.len() as u32;
        Some(*end - 1)
    });
    let last = hidden.index_select(&Tensor::new(ends.collect::<Vec<_>>(), hidden.device())?, 0)?;
    models.base.logits(&last, Some(hook.as_ref()))?.squeeze(1)?.to_device(&Device::Cpu)
}

/// The same where the label is true with a probability: `p·ℓ(c, r) + (1−p)·ℓ(r, c)`.
pub fn softened(spec: &RewardModelSpec, sides: [f64; 2], margin: f64, probability: f64) -> (f64, [f64; 2]) {
    let (said, slopes) = loss(spec, sides, margin);
    let (other, others) = loss(spec, [sides[1], sides[0]], margin);
    let mean = |said: f64, other: f64| probability * said + (1.0 - probability) * other;
    (mean(said, other), [mean(slopes[0], others[1]), mean(slopes[1], others[0])])
}

/// The loss of a pair of scores and its slopes.
pub fn loss(spec: &RewardModelSpec, [chosen, rejected]: [f64; 2], margin: f64) -> (f64, [f64; 2]) {
    let x = chosen - rejected - margin;
    let sum = chosen + rejected;
    let (slope, centre) = (-sigmoid(-x), 2.0 * spec.center_rewards_coefficient * sum);
    let loss = -log_sigmoid(x) + spec.center_rewards_coefficient * sum * sum;
    (loss, [slope + centre, -slope + centre])
}
