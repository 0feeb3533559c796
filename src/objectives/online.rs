//! What objectives over the model's own completions share.

use candle_core::Result;

use super::{
    Figures, Found, Models, Term,
    score::{score_at, score_only_at},
};
use crate::data::{Example, Row, Sampled};

/// One completion's log-probabilities, token by token, at the temperature that it was drawn with.
pub struct Tokens<'a> {
    pub policy: &'a [f64],
    /// Those of the policy that drew it.
    pub old: &'a [f64],
    /// Empty where the objective has no reference.
    pub reference: &'a [f64],
    pub advantage: f64,
}

/// What an objective makes of one completion.
pub struct Judged {
    /// Of each token: what it adds to the loss, and the slope in its log-probability.
    pub losses: Vec<(f64, f64)>,
    /// Share of tokens whose ratio is clipped.
    pub clipped: f64,
}

/// `ρ` clipped: `min(ρA, clip(ρ, 1±ε)A)` negated, its slope in `log ρ`, and whether the clipped side counts.
pub fn clipped(log_ratio: f64, advantage: f64, epsilon: f64) -> (f64, f64, bool) {
    let ratio = log_ratio.exp();
    let (free, bound) = (ratio * advantage, ratio.clamp(1.0 - epsilon, 1.0 + epsilon) * advantage);
    if free <= bound { (-free, -free, false) } else { (-bound, 0.0, true) }
}

pub fn sampled<'a>(rows: &[&'a Row]) -> Vec<&'a Sampled> {
    rows.iter()
        .filter_map(|row| match row {
            Row::Sampled(sampled) => Some(sampled),
            _ => None,
        })
        .collect()
}

/// A pass over completions: `judge` says what each is worth, `weigh` by what a completion's losses are multiplied.
pub fn pass(
    models: &Models,
    rows: &[&Row],
    judge: impl Fn(Tokens) -> Judged,
    weigh: impl Fn(&Sampled) -> f64,
) -> Result<Found> {
    let sampled = sampled(rows);
    let texts: Vec<&Example> = sampled.iter().map(|sampled| &sampled.example).collect();
    let hook = models.method.hook(None)?;
    let temperature = sampled.first().map_or(1.0, |sampled| sampled.temperature);
    let scored = score_at(models, Some(&hook), &texts, temperature)?;
    let (mut value, mut slopes, mut figures) = (0.0, Vec::with_capacity(texts.len()), Figures::default());
    for (sampled, policy) in sampled.iter().zip(&scored.texts) {
        // The first update's policy is the one that drew them.
        let old = sampled.old.as_deref().unwrap_or(policy);
        let tokens = Tokens { policy, old, reference: &sampled.reference, advantage: sampled.advantage };
        let Judged { losses, clipped } = judge(tokens);
        let weight = weigh(sampled);
        value += weight * losses.iter().map(|(loss, _)| loss).sum::<f64>();
        slopes.push(losses.iter().map(|(_, slope)| weight * slope).collect());
        figures.add("clip_ratio", clipped);
        let apart: f64 = policy.iter().zip(old).map(|(new, old)| (new - old).exp()).sum();
        figures.add("ratio", apart / policy.len().max(1) as f64);
        if !sampled.reference.is_empty() {
            let kl: f64 = policy.iter().zip(&sampled.reference).map(|(policy, reference)| k3(reference - policy)).sum();
            figures.add("kl", kl / policy.len().max(1) as f64);
        }
    }
    let gradient = scored.weighted(&slopes)?;
    Ok(Found { terms: vec![Term { value, gradient }], figures, hits: None, hook })
}

/// Schulman's third estimate of a divergence: `e^d − d − 1`, `d = log π_ref − log π`.
pub fn k3(d: f64) -> f64 {
    d.exp() - d - 1.0
}

/// Log-probabilities of completions under the reference, token by token.
pub fn reference(models: &Models, texts: &[&Example], temperature: f64) -> Result<Vec<Vec<f64>>> {
    score_only_at(models.base, models.reference, texts, temperature)
}

/// The same under the policy as it is now.
pub fn policy(models: &Models, texts: &[&Example], temperature: f64) -> Result<Vec<Vec<f64>>> {
    score_only_at(models.base, Some(&models.method.hook(None)?), texts, temperature)
}

/// Mean and deviation (n − 1) of numbers; the deviation of one is 0.
pub fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean) * (value - mean)).sum();
    (mean, if n > 1.0 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}
