//! What objectives over pairs share: both answers in one pass, and the figures that TRL reports.

use std::sync::Arc;

use candle_core::Result;

use super::{
    Figures, Found, Models, Term,
    score::{score, score_only},
};
use crate::{
    data::{Example, Pair, Row},
    model::Hook,
};

/// One answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Side {
    /// `ℓ = Σ log π(token)` over the answer's tokens, its end included.
    pub log_prob: f64,
    /// The same under the reference; 0 where there is none.
    pub reference: f64,
    pub tokens: f64,
}

impl Side {
    /// `ℓ − ℓ_ref`
    pub fn log_ratio(&self) -> f64 {
        self.log_prob - self.reference
    }

    /// `ℓ / n`
    pub fn mean(&self) -> f64 {
        self.log_prob / self.tokens
    }
}

/// What an objective makes of a pair; arrays are of the chosen and the rejected side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    pub loss: f64,
    /// `∂ loss / ∂ ℓ`
    pub slopes: [f64; 2],
    /// The implicit rewards.
    pub rewards: [f64; 2],
    /// Log-probabilities as the objective counts them: sums or means.
    pub log_probs: [f64; 2],
}

pub fn pairs<'a>(rows: &[&'a Row]) -> Vec<&'a Pair> {
    rows.iter()
        .filter_map(|row| match row {
            Row::Pair(pair) => Some(pair),
            _ => None,
        })
        .collect()
}

/// Both sides of pairs: all chosen ones, then all rejected ones.
pub fn texts<'a>(pairs: &[&'a Pair]) -> Vec<&'a Example> {
    pairs.iter().map(|pair| &pair.chosen).chain(pairs.iter().map(|pair| &pair.rejected)).collect()
}

/// A loss of pairs against the reference.
pub fn against_reference(models: &Models, rows: &[&Row], judge: impl Fn([Side; 2]) -> Verdict) -> Result<Found> {
    let pairs = pairs(rows);
    let reference = score_only(models.base, models.reference, &texts(&pairs))?;
    judged(models, &pairs, &reference, judge)
}

/// A loss of pairs by what the policy alone says.
pub fn alone(models: &Models, rows: &[&Row], judge: impl Fn([Side; 2]) -> Verdict) -> Result<Found> {
    let pairs = pairs(rows);
    judged(models, &pairs, &vec![0.0; 2 * pairs.len()], judge)
}

fn judged(models: &Models, pairs: &[&Pair], reference: &[f64], judge: impl Fn([Side; 2]) -> Verdict) -> Result<Found> {
    let hook = models.method.hook(None)?;
    let scored = score(models, Some(&hook), &texts(pairs))?;
    let side = |i: usize| Side {
        log_prob: scored.texts[i].iter().sum(),
        reference: reference[i],
        tokens: scored.texts[i].len() as f64,
    };
    let n = pairs.len();
    let verdict = |i: usize| softened(&judge, [side(i), side(n + i)], pairs[i].probability);
    let verdicts: Vec<Verdict> = (0..n).map(verdict).collect();
    let slopes = verdicts.iter().map(|v| v.slopes[0]).chain(verdicts.iter().map(|v| v.slopes[1]));
    let gradient = scored.weighted_sums(&slopes.collect::<Vec<_>>())?;
    let term = Term { value: verdicts.iter().map(|v| v.loss).sum(), gradient };
    Ok(found(vec![term], &verdicts, hook))
}

/// A label that is true with a probability: `p·ℓ(c, r) + (1−p)·ℓ(r, c)`. For DPO that is
/// `−(p·log σ(βΔ) + (1−p)·log σ(−βΔ))`.
pub fn softened(judge: impl Fn([Side; 2]) -> Verdict, sides: [Side; 2], probability: f64) -> Verdict {
    let as_said = judge(sides);
    if probability == 1.0 {
        return as_said;
    }
    let otherwise = judge([sides[1], sides[0]]);
    let mean = |said: f64, other: f64| probability * said + (1.0 - probability) * other;
    Verdict {
        loss: mean(as_said.loss, otherwise.loss),
        slopes: [mean(as_said.slopes[0], otherwise.slopes[1]), mean(as_said.slopes[1], otherwise.slopes[0])],
        ..as_said
    }
}

/// With the figures of the verdicts.
pub fn found(terms: Vec<Term>, verdicts: &[Verdict], hook: Arc<dyn Hook>) -> Found {
    let mut figures = Figures::default();
    for verdict in verdicts {
        for (side, name) in ["chosen", "rejected"].iter().enumerate() {
            figures.add(format!("rewards/{name}"), verdict.rewards[side]);
            figures.add(format!("logps/{name}"), verdict.log_probs[side]);
        }
        let [chosen, rejected] = verdict.rewards;
        figures.add("rewards/accuracies", f64::from(u8::from(chosen > rejected)));
    }
    Found { terms, figures, hits: None, hook }
}
