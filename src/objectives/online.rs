//! What objectives over the model's own completions share.

use candle_core::Result;

use super::{
    Figures, Found, Models, Term,
    score::{Scored, Spoken, score_at, score_only_at},
};
use crate::data::{Example, Row, Sampled, Worth};

/// One completion's log-probabilities, token by token, at the temperature that it was drawn with.
pub struct Tokens<'a> {
    pub policy: &'a [f64],
    /// Those of the policy that drew it.
    pub old: &'a [f64],
    /// Empty where the objective has no reference.
    pub reference: &'a [f64],
    pub advantage: f64,
    /// Token by token, where there is a value head.
    pub worth: &'a [Worth],
}

/// What an objective makes of one completion.
pub struct Judged {
    /// Of each token: what it adds to the loss, and the slope in its log-probability.
    pub losses: Vec<(f64, f64)>,
    /// How many ratios are clipped, of how many: tokens' or whole texts'.
    pub clipped: (usize, usize),
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
    let hook = models.method.hook(None)?;
    let scored = score_at(models, Some(&hook), &texts(&sampled), temperature(&sampled))?;
    let (term, figures) = of_policy(&scored, &sampled, judge, weigh)?;
    Ok(Found { terms: vec![term], figures, hits: None, hook })
}

pub fn texts<'a>(sampled: &[&'a Sampled]) -> Vec<&'a Example> {
    sampled.iter().map(|sampled| &sampled.example).collect()
}

/// All of a step are drawn with the same.
pub fn temperature(sampled: &[&Sampled]) -> f64 {
    sampled.first().map_or(1.0, |sampled| sampled.temperature)
}

/// The policy's term, as in `pass`, and its figures.
pub fn of_policy(
    scored: &Scored,
    sampled: &[&Sampled],
    judge: impl Fn(Tokens) -> Judged,
    weigh: impl Fn(&Sampled) -> f64,
) -> Result<(Term, Figures)> {
    let (mut value, mut slopes, mut figures) = (0.0, Vec::with_capacity(sampled.len()), Figures::default());
    for (sampled, policy) in sampled.iter().zip(&scored.texts) {
        // The first update's policy is the one that drew them.
        let old = sampled.old.as_deref().unwrap_or(policy);
        let (reference, advantage, worth) = (&sampled.reference, sampled.advantage, &sampled.worth);
        let Judged { losses, clipped } = judge(Tokens { policy, old, reference, advantage, worth });
        let weight = weigh(sampled);
        value += weight * losses.iter().map(|(loss, _)| loss).sum::<f64>();
        slopes.push(losses.iter().map(|(_, slope)| weight * slope).collect());
        let n = policy.len();
        figures.add_many("clip_ratio", clipped.0 as f64, clipped.1);
        figures.add_many("ratio", policy.iter().zip(old).map(|(new, old)| (new - old).exp()).sum(), n);
        // Of what was drawn: its mean is the entropy, and no sum over the vocabulary is needed.
        figures.add_many("entropy", -policy.iter().sum::<f64>(), n);
        if !reference.is_empty() {
            let kl = policy.iter().zip(reference).map(|(policy, reference)| k3(reference - policy)).sum();
            figures.add_many("kl", kl, n);
        }
    }
    Ok((Term { value, gradient: scored.weighted(&slopes)? }, figures))
}

/// Schulman's third estimate of a divergence: `e^d − d − 1`, `d = log π_ref − log π`.
pub fn k3(d: f64) -> f64 {
    d.exp() - d - 1.0
}

/// Log-probabilities of completions under the reference, token by token.
pub fn reference(models: &Models, texts: &[&Example], temperature: f64) -> Result<Vec<Vec<f64>>> {
    Ok(score_only_at(models.base, models.reference, texts, temperature, None)?.log_probs)
}

/// The same under the policy as it is now, with its value head's values if it has one.
pub fn policy(models: &Models, texts: &[&Example], temperature: f64) -> Result<Spoken> {
    let head = models.method.value_head();
    score_only_at(models.base, Some(&models.method.hook(None)?), texts, temperature, head)
}

/// Mean and deviation (n − 1) of numbers; the deviation of one is 0.
pub fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean) * (value - mean)).sum();
    (mean, if n > 1.0 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}
