//! The next token from a row of scores. A request's choices depend on its seed and position alone.

use std::collections::HashMap;

use super::{
    Sampling, TokenLogprob,
    candidates::{Candidates, by_score, with_ids},
};
use crate::domain::rng::Stream;

/// What a sequence has seen: for the penalties.
pub struct History<'a> {
    pub prompt: &'a [u32],
    pub generated: &'a [u32],
}

/// Chooses a token. `scores` are the model's, before any change.
pub fn choose(scores: &[f32], sampling: &Sampling, history: &History) -> u32 {
    let mut scores = scores.to_vec();
    penalise(&mut scores, sampling, history);
    if sampling.temperature <= 0.0 {
        return best(&scores);
    }
    let u = Stream::new(sampling.seed, SAMPLING).uniform(history.generated.len() as u64);
    Candidates::new(&scores, sampling).draw(u)
}

/// The stream of random numbers that sampling has to itself.
const SAMPLING: u64 = 0x5341_4d50;

/// OpenAI's presence and frequency penalties count generated tokens; the repetition penalty (vLLM's, CTRL's) looks at
/// the prompt too.
fn penalise(scores: &mut [f32], sampling: &Sampling, history: &History) {
    if sampling.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = history.prompt.iter().chain(history.generated).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(score) = scores.get_mut(id as usize) {
                let factor = sampling.repetition_penalty;
                *score = if *score > 0.0 { *score / factor } else { *score * factor };
            }
        }
    }
    if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        let mut counts: HashMap<u32, f32> = HashMap::new();
        for id in history.generated {
            *counts.entry(*id).or_default() += 1.0;
        }
        for (id, count) in counts {
            if let Some(score) = scores.get_mut(id as usize) {
                *score -= sampling.presence_penalty + sampling.frequency_penalty * count;
            }
        }
    }
    for (id, bias) in &sampling.logit_bias {
        if let Some(score) = scores.get_mut(*id as usize) {
            *score += bias;
        }
    }
}

/// The highest score; the lower id among equals.
fn best(scores: &[f32]) -> u32 {
    let highest = scores.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
    highest.map_or(0, |(id, _)| id as u32)
}

/// The log-probability of `id` and the `top` likeliest tokens, from the model's scores as they are.
pub fn logprob(scores: &[f32], id: u32, top: usize) -> TokenLogprob {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = scores.iter().map(|score| f64::from(score - highest).exp()).sum();
    let log_sum = f64::from(highest) + sum.ln();
    let of = |score: f32| (f64::from(score) - log_sum) as f32;
    let mut all = with_ids(scores);
    let top = top.min(all.len());
    if top > 0 {
        all.select_nth_unstable_by(top - 1, by_score);
    }
    all.truncate(top);
    all.sort_unstable_by(by_score);
    let top = all.into_iter().map(|(id, score)| (id, of(score))).collect();
    TokenLogprob { id, logprob: of(scores.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY)), top }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampling() -> Sampling {
        Sampling { temperature: 1.0, seed: 7, ..Sampling::default() }
    }

    fn pick(scores: &[f32], sampling: &Sampling) -> u32 {
        choose(scores, sampling, &History { prompt: &[], generated: &[] })
    }

    #[test]
    fn greedy_takes_the_lower_id_among_equals() {
        let greedy = Sampling { temperature: 0.0, ..sampling() };
        assert_eq!(pick(&[0.0, 3.0, 3.0, 1.0], &greedy), 1);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let scores = [0.0f32, 1.0, 2.0, -1.0].map(|x| x * 0.7);
        let mut counts = [0f64; 4];
        let n = 20_000;
        for seed in 0..n {
            counts[pick(&scores, &Sampling { seed, ..sampling() }) as usize] += 1.0;
        }
        let total: f64 = scores.iter().map(|s| f64::from(*s).exp()).sum();
        for (count, score) in counts.iter().zip(scores) {
            let p = f64::from(score).exp() / total;
            assert!((count / n as f64 - p).abs() < 0.02, "{count} of {n}, not {p}");
        }
    }

    #[test]
    fn penalties_and_bias_change_the_choice() {
        let greedy = Sampling { temperature: 0.0, ..sampling() };
        let after = |s: &Sampling| choose(&[2.0, 1.9, 1.0], s, &History { prompt: &[2], generated: &[0, 0] });
        assert_eq!(after(&greedy), 0);
        assert_eq!(after(&Sampling { presence_penalty: 0.2, ..greedy.clone() }), 1);
        assert_eq!(after(&Sampling { frequency_penalty: 0.06, ..greedy.clone() }), 1);
        assert_eq!(after(&Sampling { repetition_penalty: 1.1, ..greedy.clone() }), 1);
        assert_eq!(after(&Sampling { logit_bias: vec![(2, 5.0), (99, 1.0)], ..greedy.clone() }), 2);
        // The prompt counts for repetition alone.
        assert_eq!(after(&Sampling { repetition_penalty: 3.0, logit_bias: vec![(2, 1.0)], ..greedy }), 1);
    }

    #[test]
    fn logprobs_are_those_of_the_whole_distribution() {
        let scores = [1.0f32, 3.0, 2.0];
        let found = logprob(&scores, 0, 2);
        let total: f64 = scores.iter().map(|s| f64::from(*s).exp()).sum();
        assert!((f64::from(found.logprob) - (1f64.exp() / total).ln()).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
        assert!(logprob(&scores, 1, 0).top.is_empty());
    }

    proptest! {
        #[test]
        fn a_choice_repeats(
            scores in prop::collection::vec(-10f32..10.0, 1..60), seed: u64, top_k in 0usize..70,
            top_p in 0.01f32..1.0, temperature in 0.05f32..3.0,
        ) {
            let s = Sampling { temperature, top_p, top_k, seed, ..sampling() };
            let id = pick(&scores, &s);
            prop_assert_eq!(id, pick(&scores, &s));
        }
    }
}
