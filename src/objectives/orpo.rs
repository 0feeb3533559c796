//! Odds ratio preference optimisation (Hong et al., arXiv 2403.07691; TRL's `orpo_trainer.py`).
//!
//! `NLL(chosen prompt and answer, per token) − β·log σ(log OR)`, where with the answers' mean log-probabilities `p̄`
//! `log OR = (p̄_c − p̄_r) − (log(1 − e^p̄_c) − log(1 − e^p̄_r))`. No reference.

use candle_core::Result;

use super::{
    Found, Models, Objective, Term,
    preference::{Side, Verdict, found, pairs, softened, texts},
    score::{log_sigmoid, score, sigmoid},
};
use crate::{
    data::{Example, Row},
    domain::spec::OrpoSpec,
};

/// Mean log-probabilities stay below 0 by at least this: `1 − e^p̄` is a divisor.
const CERTAIN: f64 = -1e-9;

impl Objective for OrpoSpec {
    /// Tokens of the chosen rows that have one before them, and pairs.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        let tokens: usize = pairs(rows).iter().map(|pair| pair.chosen.ids.len() - 1).sum();
        vec![tokens as f64, rows.len() as f64]
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        let pairs = pairs(rows);
        let n = pairs.len();
        let answers = texts(&pairs);
        // Chosen rows are read from their first token on, rejected ones from their answer on.
        let read: Vec<Example> =
            (answers.iter().enumerate()).map(|(i, text)| if i < n { whole(text) } else { (*text).clone() }).collect();
        let hook = models.method.hook(None)?;
        let scored = score(models, Some(&hook), &read.iter().collect::<Vec<_>>())?;
        // Of each token that was scored: 1 in an answer, 0 in a prompt.
        let masks: Vec<Vec<f64>> = (answers.iter().zip(&read))
            .map(|(answer, read)| {
                let places = (1..read.labels.len()).filter(|place| read.labels[*place].is_some());
                places.map(|place| f64::from(u8::from(answer.labels[place].is_some()))).collect()
            })
            .collect();
        let side = |i: usize| Side {
            log_prob: scored.texts[i].iter().zip(&masks[i]).map(|(log_prob, mask)| log_prob * mask).sum(),
            reference: 0.0,
            tokens: masks[i].iter().sum(),
        };
        let judge = |i: usize| softened(|sides| verdict(self, sides), [side(i), side(n + i)], pairs[i].probability);
        let verdicts: Vec<Verdict> = (0..n).map(judge).collect();
        let slope = |i: usize| verdicts[i % n].slopes[i / n];
        let odds = masks.iter().enumerate().map(|(i, mask)| mask.iter().map(|m| m * slope(i)).collect());
        let nll = scored.texts.iter().enumerate().map(|(i, text)| vec![if i < n { -1.0 } else { 0.0 }; text.len()]);
        let terms = vec![
            Term {
                value: -scored.texts[..n].iter().flatten().sum::<f64>(),
                gradient: scored.weighted(&nll.collect::<Vec<_>>())?,
            },
            Term {
                value: verdicts.iter().map(|verdict| verdict.loss).sum(),
                gradient: scored.weighted(&odds.collect::<Vec<_>>())?,
            },
        ];
        Ok(found(terms, &verdicts, hook))
    }
}

fn whole(text: &Example) -> Example {
    Example { labels: text.ids.iter().copied().map(Some).collect(), ..text.clone() }
}

/// The odds ratio's part of the loss.
pub fn verdict(spec: &OrpoSpec, sides: [Side; 2]) -> Verdict {
    let means = sides.map(|side| side.mean().min(CERTAIN));
    // log(1 − e^p̄): of the two forms, the one that keeps its digits.
    let rest = means.map(|p| if p > -0.693 { (-p.exp_m1()).ln() } else { (-p.exp()).ln_1p() });
    let x = (means[0] - means[1]) - (rest[0] - rest[1]);
    let slope = -spec.beta * sigmoid(-x);
    // ∂ log odds / ∂ p̄ = 1 / (1 − e^p̄)
    let odds = [0, 1].map(|i| 1.0 / (-means[i].exp_m1() * sides[i].tokens));
    Verdict {
        loss: -spec.beta * log_sigmoid(x),
        slopes: [slope * odds[0], -slope * odds[1]],
        rewards: means.map(|mean| spec.beta * mean),
        log_probs: means,
    }
}
