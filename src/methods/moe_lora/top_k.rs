//! MixLoRA's and MoLA's choice: the k most probable experts of a row, their probabilities made to sum to 1.

use std::cmp::Ordering;

use candle_core::{D, Result, Tensor};

use super::{
    balance::switch_balance,
    router::{Choice, Gate, Scores},
};
use crate::model::At;

pub struct TopK(pub usize);

impl Gate for TopK {
    fn choose(&self, scores: &Scores) -> Result<Choice> {
        let active: Vec<bool> = scores.values.iter().flat_map(|p| best(p, self.0)).collect();
        let mask: Vec<f32> = active.iter().map(|active| f32::from(*active)).collect();
        let kept = (&scores.p * Tensor::from_vec(mask, scores.p.shape(), scores.p.device())?)?;
        Ok(Choice { weights: kept.broadcast_div(&kept.sum_keepdim(D::Minus1)?)?, active: Some(active) })
    }

    fn balance(&self, _: At, scores: &Scores, choice: &Choice) -> Result<Tensor> {
        switch_balance(&scores.p, choice)
    }
}

/// Whether each is among the k largest; of equal ones the first.
fn best(p: &[f32], k: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*b].partial_cmp(&p[*a]).unwrap_or(Ordering::Equal));
    let mut active = vec![false; p.len()];
    order.iter().take(k).for_each(|e| active[*e] = true);
    active
}

#[cfg(test)]
mod tests {
    use super::best;

    #[test]
    fn the_largest_and_of_equal_ones_the_first() {
        assert_eq!(best(&[0.1, 0.4, 0.2, 0.3], 2), [false, true, false, true]);
        assert_eq!(best(&[0.25, 0.25, 0.25, 0.25], 2), [true, true, false, false]);
    }
}
