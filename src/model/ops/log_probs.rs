//! Log-probabilities of chosen tokens under the output layer, in chunks: the scores of all rows are never there at
//! once. What `cross_entropy` is for one sum, this is for objectives that weigh each token by what all of them say.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{cross_entropy::by_scores, frozen_linear, graph::node, is_composed, tensor, with};
use crate::model::{Target, weight::Weight};

/// `log softmax(h Wᵀ)[token]` of each target, `(targets)`, and how many tokens are the argmax. The targets' weights
/// do not matter.
pub fn log_probs(hidden: &Tensor, weight: &Arc<Weight>, targets: &[Target]) -> Result<(Tensor, usize)> {
    if is_composed(hidden) {
        return dense_log_probs(&frozen_linear(hidden, weight)?, targets);
    }
    let (hidden, (rows, h)) = (hidden.contiguous()?, hidden.dims2()?);
    let targets: Vec<Target> = targets.iter().map(|target| Target { weight: -1.0, ..*target }).collect();
    // `∂ log p / ∂ hidden row` of each target, made in the forward pass while the scores are there.
    let is_asked = hidden.track_op();
    let mut gradients = Vec::with_capacity(if is_asked { targets.len() * h } else { 0 });
    let (mut values, mut correct) = (Vec::with_capacity(targets.len()), 0);
    with([&hidden], |[hidden]| {
        by_scores(hidden, h, weight, &targets, is_asked, |_, losses, dx| {
            values.extend(losses.iter().map(|(nll, _)| -nll as f32));
            correct += losses.iter().filter(|(_, is_best)| *is_best).count();
            gradients.extend_from_slice(dx);
        })
    })?;
    let n = values.len();
    let values = node("log-probs", (values, n), [&hidden], [], move |g, [], _| {
        let mut dx = vec![0.0; rows * h];
        with([g], |[g]| {
            for ((target, part), g) in targets.iter().zip(gradients.chunks(h)).zip(g) {
                let row = &mut dx[target.row * h..][..h];
                row.iter_mut().zip(part).for_each(|(x, d)| *x += g * d);
            }
            Ok(())
        })?;
        Ok([Some(tensor(dx, (rows, h))?)])
    })?;
    Ok((values, correct))
}

/// The same over scores that are there already, `(rows, vocab)`, from candle's own ops.
pub fn dense_log_probs(scores: &Tensor, targets: &[Target]) -> Result<(Tensor, usize)> {
    let device = scores.device();
    let rows = Tensor::new(targets.iter().map(|t| t.row as u32).collect::<Vec<_>>(), device)?;
    let tokens = Tensor::new(targets.iter().map(|t| t.token).collect::<Vec<_>>(), device)?;
    let log_probs = candle_nn::ops::log_softmax(&scores.index_select(&rows, 0)?, 1)?;
    let chosen = log_probs.gather(&tokens.unsqueeze(1)?, 1)?.squeeze(1)?;
    let best: Vec<u32> = log_probs.argmax(1)?.to_vec1()?;
    let correct = best.iter().zip(targets).filter(|(best, target)| **best == target.token).count();
    Ok((chosen, correct))
}
