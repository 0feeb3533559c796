//! AdaMoLE's choice: `τ = τ_max · σ(w_τ·x + b_τ)`; experts with `p ≥ τ`, by `(p − τ) / Σ (p − τ)`.
//!
//! τ_max is at most 1/E, so at least one expert reaches it; if none exceeds it, the row gets nothing. The balance
//! counts `max(p − τ, 0)`: where the authors' code lets it fall below zero, a loss could be lowered without end by
//! raising τ.

use candle_core::{D, Result, Tensor};

use super::{
    balance::switch_balance,
    router::{Choice, Gate, Scores},
};
use crate::model::{At, ops::trained_linear};

pub struct Threshold {
    /// `(1, in)` and `(1)`
    pub weight: Tensor,
    pub bias: Tensor,
    pub max: f64,
}

impl Threshold {
    /// `max(p − τ, 0)`
    fn excess(&self, scores: &Scores) -> Result<Tensor> {
        let tau = trained_linear(scores.x, &self.weight)?.broadcast_add(&self.bias.to_device(scores.x.device())?)?;
        let tau = candle_nn::ops::sigmoid(&tau)?.affine(self.max, 0.0)?;
        scores.p.broadcast_sub(&tau)?.relu()
    }
}

impl Gate for Threshold {
    fn choose(&self, scores: &Scores) -> Result<Choice> {
        let excess = self.excess(scores)?;
        let values = excess.to_vec2::<f32>()?;
        // A row without any excess divides by 1.
        let rest: Vec<f32> = values.iter().map(|row| f32::from(row.iter().all(|x| *x == 0.0))).collect();
        let sum = (excess.sum_keepdim(D::Minus1)? + Tensor::from_vec(rest, (values.len(), 1), scores.p.device())?)?;
        let active = values.iter().flatten().map(|x| *x > 0.0).collect();
        Ok(Choice { weights: excess.broadcast_div(&sum)?, active: Some(active) })
    }

    fn balance(&self, _: At, scores: &Scores, choice: &Choice) -> Result<Tensor> {
        switch_balance(&self.excess(scores)?, choice)
    }
}
