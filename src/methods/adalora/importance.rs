//! Which triplets matter (arXiv 2303.10512, §3.2; PEFT's `RankAllocator`).
//!
//! For each trained number `I = |w · ∂w|` after a step, smoothed: `Ī ← β₁ Ī + (1−β₁) I`,
//! `Ū ← β₂ Ū + (1−β₂) |I − Ī|`; its score is `Ī · Ū`. A triplet's score is that of its singular value plus the means
//! over its two vectors. In f32, as torch.

/// One variable's statistics.
#[derive(Clone, Debug, PartialEq)]
pub struct Sensitivity {
    /// Ī
    pub mean: Vec<f32>,
    /// Ū
    pub uncertainty: Vec<f32>,
}

impl Sensitivity {
    pub fn new(n: usize) -> Self {
        Self { mean: vec![0.0; n], uncertainty: vec![0.0; n] }
    }

    pub fn update(&mut self, weights: &[f32], gradient: &[f32], beta1: f64, beta2: f64) {
        let (keep1, new1) = (beta1 as f32, (1.0 - beta1) as f32);
        let (keep2, new2) = (beta2 as f32, (1.0 - beta2) as f32);
        let statistics = self.mean.iter_mut().zip(&mut self.uncertainty);
        for ((w, g), (mean, uncertainty)) in weights.iter().zip(gradient).zip(statistics) {
            let now = (w * g).abs();
            *mean = keep1 * *mean + new1 * now;
            *uncertainty = keep2 * *uncertainty + new2 * (now - *mean).abs();
        }
    }

    fn scores(&self) -> impl Iterator<Item = f32> {
        self.mean.iter().zip(&self.uncertainty).map(|(mean, uncertainty)| mean * uncertainty)
    }
}

/// The scores of a module's `r` triplets; the statistics are those of its A `(r, in)`, E `(r, 1)` and B `(out, r)`.
pub fn scores([a, e, b]: [&Sensitivity; 3], r: usize) -> Vec<f32> {
    let mut rows = vec![0f64; r];
    let mut columns = vec![0f64; r];
    let (inputs, outputs) = (a.mean.len() / r, b.mean.len() / r);
    a.scores().enumerate().for_each(|(i, score)| rows[i / inputs] += f64::from(score));
    b.scores().enumerate().for_each(|(i, score)| columns[i % r] += f64::from(score));
    let vectors = rows.iter().zip(&columns);
    let vectors = vectors.map(|(row, column)| (row / inputs as f64) as f32 + (column / outputs as f64) as f32);
    e.scores().zip(vectors).map(|(value, vectors)| value + vectors).collect()
}

/// Which triplets stay when `left` of them may: those that score above the last that has to go. Ties with it go too.
pub fn kept(scores: &[Vec<f32>], left: usize) -> Vec<Vec<bool>> {
    let mut sorted: Vec<f32> = scores.iter().flatten().copied().collect();
    sorted.sort_unstable_by(f32::total_cmp);
    let threshold = sorted.len().checked_sub(left + 1).map_or(f32::NEG_INFINITY, |last| sorted[last]);
    scores.iter().map(|scores| scores.iter().map(|score| *score > threshold).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_go_and_ties_with_them() {
        let scores = vec![vec![3.0, 1.0, 2.0], vec![2.0, 5.0, 4.0]];
        assert_eq!(kept(&scores, 6), [[true; 3], [true; 3]]);
        assert_eq!(kept(&scores, 5), [[true, false, true], [true; 3]]);
        // Four may stay; the second to go ties with the third.
        assert_eq!(kept(&scores, 4), [[true, false, false], [false, true, true]]);
        assert_eq!(kept(&scores, 0), [[false; 3], [false; 3]]);
    }

    #[test]
    fn a_triplet_scores_by_its_value_and_its_vectors() {
        // Statistics after two steps, by hand: β₁ = 0.5, β₂ = 0.25.
        let mut e = Sensitivity::new(2);
        e.update(&[2.0, -1.0], &[-3.0, 0.5], 0.5, 0.25);
        assert_eq!((e.mean.clone(), e.uncertainty.clone()), (vec![3.0, 0.25], vec![2.25, 0.1875]));
        e.update(&[1.0, 4.0], &[1.0, 1.0], 0.5, 0.25);
        assert_eq!((e.mean.clone(), e.uncertainty.clone()), (vec![2.0, 2.125], vec![1.3125, 1.453125]));
        let of = |values: &[f32]| Sensitivity { mean: values.to_vec(), uncertainty: vec![1.0; values.len()] };
        // A: two rows of three; B: four rows of two.
        let (a, b) = (of(&[1.0, 2.0, 3.0, 4.0, 5.0, 9.0]), of(&[1.0, 0.0, 2.0, 0.0, 3.0, 1.0, 6.0, 1.0]));
        assert_eq!(scores([&a, &e, &b], 2), [2.625 + 5.0, 2.125 * 1.453125 + 6.5]);
    }
}
