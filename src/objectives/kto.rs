//! Kahneman–Tversky optimisation (Ethayarajh et al., arXiv 2402.01306; TRL's `kto_trainer.py`).
//!
//! With `r = ℓ − ℓ^ref`: desirable `λ_D(1 − σ(β(r − z)))`, undesirable `λ_U(1 − σ(β(z − r)))`. The reference point is
//! `z = max(0, mean of ℓ − ℓ^ref over mismatched rows)`, without a gradient: each row's prompt with the answer of
//! the row before it in the micro-batch, the first one's with the last one's. A micro-batch of a single row (the rest
//! of an epoch) has no mismatch: there z is 0.

use candle_core::Result;

use super::{
    Figures, Found, Models, Objective, Term,
    preference::Side,
    score::{score, score_only, sigmoid},
};
use crate::{
    data::{Example, Judged, Row},
    domain::spec::KtoSpec,
};

impl Objective for KtoSpec {
    /// Rows.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        vec![rows.len() as f64]
    }

    fn has_reference(&self) -> bool {
        true
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        let judged: Vec<&Judged> = rows
            .iter()
            .filter_map(|row| match row {
                Row::Judged(judged) => Some(judged),
                _ => None,
            })
            .collect();
        let texts: Vec<&Example> = judged.iter().map(|judged| &judged.example).collect();
        let hook = models.method.hook(None)?;
        let mixed = mismatched(&texts, models.limit);
        let mixed: Vec<&Example> = mixed.iter().collect();
        let z = match mixed.len() {
            0 => 0.0,
            n => {
                // A hook of its own: a penalty is of the pass that is trained.
                let policy: f64 = score_only(models.base, Some(&models.method.hook(None)?), &mixed)?.iter().sum();
                let reference: f64 = score_only(models.base, models.reference, &mixed)?.iter().sum();
                ((policy - reference) / n as f64).max(0.0)
            }
        };
        let reference = score_only(models.base, models.reference, &texts)?;
        let scored = score(models, Some(&hook), &texts)?;
        let mut figures = Figures::default();
        figures.add("kl", z);
        let (mut value, mut slopes) = (0.0, Vec::with_capacity(texts.len()));
        for ((judged, log_prob), reference) in judged.iter().zip(scored.sums()).zip(reference) {
            let side = Side { log_prob, reference, tokens: judged.example.trained() as f64 };
            let (loss, slope) = loss(self, judged.is_desirable, &side, z);
            value += loss;
            slopes.push(slope);
            let name = if judged.is_desirable { "chosen" } else { "rejected" };
            figures.add(format!("rewards/{name}"), self.beta * side.log_ratio());
            figures.add(format!("logps/{name}"), log_prob);
            // Rewarded as it should be.
            let is_right = (side.log_ratio() > z) == judged.is_desirable;
            figures.add("rewards/accuracies", f64::from(u8::from(is_right)));
        }
        let terms = vec![Term { value, gradient: scored.weighted_sums(&slopes)? }];
        Ok(Found { terms, figures, hits: None, hook })
    }
}

/// The loss of one answer and its slope in ℓ.
pub fn loss(spec: &KtoSpec, is_desirable: bool, side: &Side, z: f64) -> (f64, f64) {
    let (sign, weight) = if is_desirable { (1.0, spec.desirable_weight) } else { (-1.0, spec.undesirable_weight) };
    let x = sign * spec.beta * (side.log_ratio() - z);
    (weight * sigmoid(-x), -weight * sign * spec.beta * sigmoid(x) * sigmoid(-x))
}

/// Each prompt with the answer before it, cut to the limit; nothing where there is only one.
fn mismatched(texts: &[&Example], limit: usize) -> Vec<Example> {
    let n = texts.len();
    let start = |text: &Example| text.labels.iter().position(Option::is_some).unwrap_or(text.ids.len());
    let mix = |i: usize| {
        let (prompt, answer) = (texts[i], texts[(i + n - 1) % n]);
        let (before, from) = (start(prompt), start(answer));
        let ids = prompt.ids[..before].iter().chain(&answer.ids[from..]).copied();
        let labels = prompt.labels[..before].iter().chain(&answer.labels[from..]).copied();
        Example { line: prompt.line, ids: ids.take(limit).collect(), labels: labels.take(limit).collect() }
    };
    if n < 2 { Vec::new() } else { (0..n).map(mix).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(prompt: &[u32], answer: &[u32]) -> Example {
        let labels = prompt.iter().map(|_| None).chain(answer.iter().copied().map(Some)).collect();
        Example { line: 1, ids: [prompt, answer].concat(), labels }
    }

    #[test]
    fn answers_go_round_by_one() {
        let rows = [text(&[1, 2], &[3]), text(&[4], &[5, 6]), text(&[7], &[8])];
        let mixed = mismatched(&rows.iter().collect::<Vec<_>>(), 3);
        assert_eq!(mixed, [text(&[1, 2], &[8]), text(&[4], &[3]), text(&[7], &[5, 6])]);
        assert_eq!(mismatched(&[&rows[1], &rows[0]], 2), [text(&[4], &[3]), text(&[1, 2], &[])]);
        assert!(mismatched(&[&rows[0]], 9).is_empty());
    }
}
