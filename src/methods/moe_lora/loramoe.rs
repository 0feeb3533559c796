//! LoRAMoE's choice: every expert, by its probability.
//!
//! Localised balance: with `Q: (sequences, E)` the mean of p over each sequence's rows, `Var(Q) / mean(Q)²`, as in the
//! authors' code. Two things differ from it: the mean over rows stands for their sum, which would make the lengths of
//! sequences a part of the variance; and rows have no task types, so all of Q counts alike (δ = 0).

use candle_core::{Result, Tensor};

use super::router::{Choice, Gate, Scores};
use crate::model::At;

pub struct All;

impl Gate for All {
    fn choose(&self, scores: &Scores) -> Result<Choice> {
        Ok(Choice { weights: scores.p.clone(), active: None })
    }

    fn balance(&self, at: At, scores: &Scores, _: &Choice) -> Result<Tensor> {
        let mut start = 0;
        let loads = at.lengths.iter().map(|n| {
            start += n;
            scores.p.narrow(0, start - n, *n)?.mean(0)
        });
        let loads = Tensor::cat(&loads.collect::<Result<Vec<_>>>()?, 0)?;
        let mean = loads.mean_all()?;
        let square = loads.broadcast_sub(&mean)?.sqr()?.sum_all()?;
        square.affine(1.0 / (loads.elem_count() - 1) as f64, 0.0)? / mean.sqr()?
    }
}
