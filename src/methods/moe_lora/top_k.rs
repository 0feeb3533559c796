//! MixLoRA's and MoLA's choice: the k most probable experts of a row, their probabilities made to sum to 1.

use candle_core::{D, Result, Tensor};

use super::{
    balance::switch_balance,
    router::{Choice, Gate, Scores},
};
use crate::{methods::top_k::largest, model::At};

pub struct TopK(pub usize);

impl TopK {
    /// The same for one row.
    pub fn weights(&self, p: &[f32]) -> Vec<f32> {
        let kept = largest(p, self.0).into_iter().zip(p).map(|(active, p)| if active { *p } else { 0.0 });
        let kept: Vec<f32> = kept.collect();
        let sum: f32 = kept.iter().sum();
        kept.into_iter().map(|p| p / sum).collect()
    }
}

impl Gate for TopK {
    fn choose(&self, scores: &Scores) -> Result<Choice> {
        let active: Vec<bool> = scores.values.iter().flat_map(|p| largest(p, self.0)).collect();
        let mask: Vec<f32> = active.iter().map(|active| f32::from(*active)).collect();
        let kept = (&scores.p * Tensor::from_vec(mask, scores.p.shape(), scores.p.device())?)?;
        Ok(Choice { weights: kept.broadcast_div(&kept.sum_keepdim(D::Minus1)?)?, active: Some(active) })
    }

    fn balance(&self, _: At, scores: &Scores, choice: &Choice) -> Result<Tensor> {
        switch_balance(&scores.p, choice)
    }
}
