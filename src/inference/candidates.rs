//! Which tokens may be drawn, and the draw. The vocabulary is sorted only as far as a draw looks at it.

use std::cmp::Ordering;

use super::Sampling;

/// The higher score first; the lower id among equals.
pub fn by_score(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

pub fn with_ids(scores: &[f32]) -> Vec<(u32, f32)> {
    scores.iter().enumerate().map(|(id, score)| (id as u32, *score)).collect()
}

/// Tokens by falling score.
struct Falling {
    all: Vec<(u32, f32)>,
    /// So many at the start are in order; the others come behind them in any order.
    sorted: usize,
}

impl Falling {
    /// How many are sorted at first; then four times as many, and so on.
    const FIRST: usize = 64;

    fn at(&mut self, i: usize) -> Option<(u32, f32)> {
        while i >= self.sorted && self.sorted < self.all.len() {
            let rest = &mut self.all[self.sorted..];
            let n = (3 * self.sorted).max(Self::FIRST).min(rest.len());
            if n < rest.len() {
                rest.select_nth_unstable_by(n - 1, by_score);
            }
            rest[..n].sort_unstable_by(by_score);
            self.sorted += n;
        }
        self.all.get(i).copied()
    }
}

/// The tokens that stay after top-k, min-p and top-p, in this order.
pub struct Candidates {
    falling: Falling,
    highest: f32,
    temperature: f32,
    kept: usize,
    /// The sum of their weights.
    mass: f64,
}

impl Candidates {
    /// `sampling.temperature` is above 0.
    pub fn new(scores: &[f32], sampling: &Sampling) -> Self {
        let mut all = with_ids(scores);
        // What a grammar rules out cannot be drawn, whatever the roundings of the sums.
        all.retain(|(_, score)| *score > f32::NEG_INFINITY);
        let all = top_k(all, sampling.top_k);
        let highest = all.iter().map(|(_, score)| *score).fold(f32::NEG_INFINITY, f32::max);
        let kept = all.len();
        let falling = Falling { all, sorted: 0 };
        let mut found = Self { falling, highest, temperature: sampling.temperature, kept, mass: 0.0 };
        // In the order of ids: a sum must not depend on how far anything is sorted.
        let total = found.falling.all.iter().map(|(_, score)| found.weight(*score)).sum();
        found.mass = total;
        if sampling.min_p > 0.0 || sampling.top_p < 1.0 {
            found.cut(f64::from(sampling.min_p), f64::from(sampling.top_p) * total);
        }
        found
    }

    /// Relative to the likeliest token, which has 1.
    fn weight(&self, score: f32) -> f64 {
        f64::from(((score - self.highest) / self.temperature).exp())
    }

    /// Keeps the likeliest tokens: until one weighs less than `least`, or those before it have `enough` together.
    fn cut(&mut self, least: f64, enough: f64) {
        (self.kept, self.mass) = (0, 0.0);
        while let Some((_, score)) = self.falling.at(self.kept) {
            let weight = self.weight(score);
            if self.kept > 0 && (weight < least || self.mass >= enough) {
                return;
            }
            self.mass += weight;
            self.kept += 1;
        }
    }

    /// The token at the place `u`, `[0, 1)`, of the distribution.
    pub fn draw(mut self, u: f32) -> u32 {
        let (mut left, mut chosen) = (f64::from(u) * self.mass, 0);
        for i in 0..self.kept {
            let Some((id, score)) = self.falling.at(i) else { break };
            (left, chosen) = (left - self.weight(score), id);
            if left < 0.0 {
                break;
            }
        }
        chosen
    }
}

/// The `k` with the highest scores, in the order of their ids; 0 keeps all.
fn top_k(all: Vec<(u32, f32)>, k: usize) -> Vec<(u32, f32)> {
    if k == 0 || k >= all.len() {
        return all;
    }
    let last = *all.clone().select_nth_unstable_by(k - 1, by_score).1;
    all.into_iter().filter(|token| by_score(token, &last).is_le()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same by sorting everything.
    fn plain(scores: &[f32], sampling: &Sampling, u: f32) -> (usize, u32) {
        let mut sorted = with_ids(scores);
        sorted.sort_by(by_score);
        let k = if sampling.top_k == 0 { sorted.len() } else { sampling.top_k.min(sorted.len()) };
        sorted.truncate(k);
        let weight = |score: f32| f64::from(((score - sorted[0].1) / sampling.temperature).exp());
        let mut by_id = sorted.clone();
        by_id.sort_by_key(|(id, _)| *id);
        let total: f64 = by_id.iter().map(|(_, score)| weight(*score)).sum();
        let (mut kept, mut mass) = (0, 0.0);
        for (_, score) in &sorted {
            let enough = sampling.top_p < 1.0 && mass >= f64::from(sampling.top_p) * total;
            if kept > 0 && (weight(*score) < f64::from(sampling.min_p) || enough) {
                break;
            }
            mass += weight(*score);
            kept += 1;
        }
        if kept == sorted.len() && sampling.top_p >= 1.0 && sampling.min_p == 0.0 {
            mass = total;
        }
        let mut left = f64::from(u) * mass;
        for (id, score) in &sorted[..kept] {
            left -= weight(*score);
            if left < 0.0 {
                return (kept, *id);
            }
        }
        (kept, sorted[kept - 1].0)
    }

    fn check(scores: &[f32], sampling: &Sampling, u: f32) {
        let found = Candidates::new(scores, sampling);
        assert_eq!((found.kept, found.draw(u)), plain(scores, sampling, u), "{sampling:?} {u}");
    }

    proptest! {
        #[test]
        fn sorting_as_far_as_needed_is_sorting_all(
            // Few different values: most scores have an equal.
            scores in prop::collection::vec((-12i8..12).prop_map(|x| f32::from(x) * 0.5), 1..900),
            u in 0f32..1.0, top_k in prop_oneof![Just(0usize), 0usize..1000], temperature in 0.05f32..4.0,
            top_p in prop_oneof![Just(1f32), 0.01f32..1.0], min_p in prop_oneof![Just(0f32), 0f32..1.0],
        ) {
            check(&scores, &Sampling { temperature, top_p, top_k, min_p, ..Sampling::default() }, u);
        }

        #[test]
        fn so_it_is_without_ties(
            scores in prop::collection::vec(-10f32..10.0, 1..900), u in 0f32..1.0, top_k in 0usize..1000,
            temperature in 0.05f32..4.0, top_p in 0.01f32..1.5, min_p in -0.5f32..0.5,
        ) {
            let sampling = Sampling { top_p: top_p.min(1.0), min_p: min_p.max(0.0), ..Sampling::default() };
            check(&scores, &Sampling { temperature, top_k, ..sampling }, u);
        }
    }

    #[test]
    fn a_draw_sorts_no_more_than_it_looks_at() {
        let scores: Vec<f32> = (0..50_000).map(|i| ((i * 7919) % 50_000) as f32 * 1e-3).collect();
        let mut found = Candidates::new(&scores, &Sampling { top_p: 0.5, ..Sampling::default() });
        assert!(found.falling.sorted <= 4096, "{}", found.falling.sorted);
        let place = |found: &mut Candidates, i: usize| found.falling.at(i).unwrap().1;
        assert!((0..found.kept - 1).all(|i| place(&mut found, i) > place(&mut found, i + 1)));
    }

    #[test]
    fn the_smallest_temperature_is_greedy() {
        for temperature in [f32::MIN_POSITIVE, 1e-45, 1e-6] {
            let sampling = Sampling { temperature, ..Sampling::default() };
            assert_eq!(Candidates::new(&[1.0, 2.0, 1.999], &sampling).draw(0.999), 1);
        }
    }

    #[test]
    fn each_cut_leaves_out_what_it_should() {
        let scores = [4.0f32, 3.0, 2.0, 1.0, 0.0]; // probabilities 0.636 0.234 0.086 0.032 0.012
        let kept = |s: Sampling| Candidates::new(&scores, &s).kept;
        let all = Sampling::default;
        assert_eq!(kept(all()), 5);
        assert_eq!(kept(Sampling { top_k: 2, ..all() }), 2);
        assert_eq!(kept(Sampling { top_p: 0.7, ..all() }), 2);
        assert_eq!(kept(Sampling { top_p: 0.6, ..all() }), 1);
        assert_eq!(kept(Sampling { min_p: 0.1, ..all() }), 3);
        assert_eq!(kept(Sampling { temperature: 0.1, min_p: 0.1, ..all() }), 1);
    }
}
