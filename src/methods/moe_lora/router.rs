//! Which experts work for which row, and how much each counts.
//!
//! `p = softmax(x W_gᵀ)` with `W_g: (E, in)`, in f32; a variant's gate makes of p the weights `w: (rows, E)` and says
//! which of them are active. A row's choice depends on nothing but that row: there is no capacity.

use candle_core::{D, Result, Tensor};

use super::balance::Tally;
use crate::{
    domain::rng::Stream,
    model::{At, ops::trained_linear},
};

/// A router's input and what it found.
pub struct Scores<'a> {
    pub x: &'a Tensor,
    /// `(rows, E)`
    pub p: Tensor,
    /// The same as numbers, row by row.
    pub values: Vec<Vec<f32>>,
}

/// What a gate makes of the scores.
pub struct Choice {
    /// `(rows, E)`; zero where an expert is not active.
    pub weights: Tensor,
    /// `rows · E`; none where a variant always has all experts at work.
    pub active: Option<Vec<bool>>,
}

/// How a variant chooses.
pub trait Gate: Send + Sync {
    fn choose(&self, scores: &Scores) -> Result<Choice>;

    /// What it adds to the loss, before its coefficient.
    fn balance(&self, at: At, scores: &Scores, choice: &Choice) -> Result<Tensor>;
}

pub struct Router {
    /// `W_g`
    pub weight: Tensor,
    pub gate: Box<dyn Gate>,
    pub jitter: f64,
    /// Tells the routers of a pass apart.
    pub place: u64,
}

impl Router {
    /// What it chose goes to the tally, where there is one.
    pub fn choose(&self, at: At, x: &Tensor, tally: Option<&Tally>) -> Result<Choice> {
        let jittered = self.jittered(at, x)?;
        let x = jittered.as_ref().unwrap_or(x);
        let p = candle_nn::ops::softmax(&trained_linear(x, &self.weight)?, D::Minus1)?;
        let scores = Scores { x, values: p.to_vec2()?, p };
        let choice = self.gate.choose(&scores)?;
        if let Some(tally) = tally {
            tally.note(&scores, &choice, || self.gate.balance(at, &scores, &choice))?;
        }
        Ok(choice)
    }

    /// The router's own copy of its input, times numbers in `1 ± jitter`.
    fn jittered(&self, at: At, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(key) = at.train.filter(|_| self.jitter > 0.0) else { return Ok(None) };
        // Dropout has the places below.
        let (stream, jitter) = (Stream::new(key, 1 << 32 | self.place), self.jitter as f32);
        let noise: Vec<f32> = stream.uniforms(x.elem_count()).map(|u| 1.0 + jitter * (2.0 * u - 1.0)).collect();
        (x * Tensor::from_vec(noise, x.shape(), x.device())?).map(Some)
    }
}

/// The active pairs of row and expert, expert by expert.
pub struct Routing {
    /// The row of each pair.
    rows: Tensor,
    /// Each pair's weight, `(pairs, 1)`.
    weights: Tensor,
    /// Pairs of each expert.
    counts: Vec<usize>,
}

impl Routing {
    pub fn new(choice: &Choice) -> Result<Self> {
        let (n, experts) = choice.weights.dims2()?;
        let (mut rows, mut places) = (Vec::<u32>::new(), Vec::<u32>::new());
        let mut counts = vec![0; experts];
        let is_active = |place: &usize| choice.active.as_ref().is_none_or(|active| active[*place]);
        for (expert, count) in counts.iter_mut().enumerate() {
            for place in (expert..n * experts).step_by(experts).filter(is_active) {
                rows.push((place / experts) as u32);
                places.push(place as u32);
                *count += 1;
            }
        }
        let pairs = rows.len();
        let device = choice.weights.device();
        let weights = choice.weights.flatten_all()?.index_select(&Tensor::new(places, device)?, 0)?;
        Ok(Self { rows: Tensor::new(rows, device)?, weights: weights.reshape((pairs, 1))?, counts })
    }

    pub fn is_empty(&self) -> bool {
        self.counts.iter().all(|count| *count == 0)
    }

    /// Pairs of each expert, in the order of `gather`'s rows.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// `(rows, width) → (pairs, width)`
    pub fn gather(&self, x: &Tensor) -> Result<Tensor> {
        x.index_select(&self.rows, 0)
    }

    /// `y + Σ w · z` over each row's pairs; y: `(rows, width)`, z: `(pairs, width)`.
    pub fn add(&self, y: &Tensor, z: &Tensor) -> Result<Tensor> {
        y.index_add(&self.rows, &z.broadcast_mul(&self.weights)?, 0)
    }
}
