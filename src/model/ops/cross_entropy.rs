//! Cross entropy of the output layer over chosen rows, in chunks: the scores of all rows are never there at once.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{frozen_linear, graph::node, is_composed, log_probs::dense_log_probs, tensor, with};
use crate::model::{Target, chunked, kernels::Mat, kernels::elementwise, turns::in_parts, weight::Weight};

/// Numbers of scores that are there at once: of a small vocabulary many rows, since the output layer is unpacked for
/// each chunk.
const SCORES: usize = 24 << 20;

/// As long as so many products of two numbers takes what is done with a score.
const OF_SCORE: usize = 16;

/// Rows whose scores are held at once.
pub fn scored_rows(vocab: usize) -> usize {
    (SCORES / vocab.max(1)).clamp(64, 512)
}

/// `Σ weight · −log softmax(h Wᵀ)[token]` over the targets, as a scalar, and how many tokens are the argmax.
pub fn cross_entropy(hidden: &Tensor, weight: &Arc<Weight>, targets: &[Target]) -> Result<(Tensor, usize)> {
    if is_composed(hidden) {
        return chunked::cross_entropy(hidden, &[], targets, |_, x| frozen_linear(x, weight));
    }
    let (hidden, (rows, h)) = (hidden.contiguous()?, hidden.dims2()?);
    let is_asked = hidden.track_op();
    let mut gradient = vec![0.0; if is_asked { rows * h } else { 0 }];
    let (mut loss, mut correct) = (0f64, 0);
    with([&hidden], |[hidden]| {
        by_scores(hidden, h, weight, targets, is_asked, |targets, losses, dx| {
            for ((nll, is_best), target) in losses.into_iter().zip(targets) {
                loss += nll * f64::from(target.weight);
                correct += usize::from(is_best);
            }
            for (target, dx) in targets.iter().zip(dx.chunks(h)) {
                let row = &mut gradient[target.row * h..(target.row + 1) * h];
                row.iter_mut().zip(dx).for_each(|(g, d)| *g += d);
            }
        })
    })?;
    // The gradient for the hidden rows is made in the forward pass, while the scores are there.
    let loss = node("cross-entropy", (vec![loss as f32], ()), [&hidden], [], move |g, [], _| {
        let scale = g.to_scalar::<f32>()?;
        Ok([Some(tensor(gradient.iter().map(|x| x * scale).collect(), (rows, h))?)])
    })?;
    Ok((loss, correct))
}

/// Of some targets at a time: `(−log p(token), is argmax)` of each, and if asked for the gradients of
/// `Σ weight · −log p(token)` for their hidden rows, `(targets, h)`.
pub(super) fn by_scores(
    hidden: &[f32],
    h: usize,
    weight: &Weight,
    targets: &[Target],
    is_asked: bool,
    mut take: impl FnMut(&[Target], Vec<(f64, bool)>, &[f32]),
) -> Result<()> {
    let (rows, vocab) = (hidden.len() / h, weight.rows);
    if let Some(bad) = targets.iter().find(|t| t.row >= rows || t.token as usize >= vocab) {
        candle_core::bail!("target {bad:?} is outside {rows} rows and {vocab} tokens");
    }
    for targets in targets.chunks(scored_rows(vocab)) {
        let n = targets.len();
        let x: Vec<f32> = targets.iter().flat_map(|t| &hidden[t.row * h..(t.row + 1) * h]).copied().collect();
        let mut scores = weight.product(Mat::new(&x, n, h));
        let mut losses = Vec::with_capacity(n);
        in_parts(n, OF_SCORE * vocab, |rows| {
            let scores = scores[rows.start * vocab..rows.end * vocab].par_chunks_mut(vocab);
            losses.par_extend(scores.zip(&targets[rows]).map(|(row, target)| row_loss(row, target)));
        });
        let dx = if is_asked { weight.product_back(Mat::new(&scores, n, vocab)) } else { Vec::new() };
        take(targets, losses, &dx);
    }
    Ok(())
}

/// Turns one row of scores into its gradient; returns `(−log p(token), is argmax)`.
fn row_loss(scores: &mut [f32], target: &Target) -> (f64, bool) {
    let token = target.token as usize;
    let score = scores[token];
    let is_best = scores.iter().enumerate().all(|(i, x)| *x < score || (*x == score && i >= token));
    let log_sum = elementwise::softmax(scores);
    scores[token] -= 1.0;
    scores.iter_mut().for_each(|x| *x *= target.weight);
    (f64::from(log_sum) - f64::from(score), is_best)
}

/// The same over scores that are there already, `(rows, vocab)`, from candle's own ops.
pub fn dense_cross_entropy(scores: &Tensor, targets: &[Target]) -> Result<(Tensor, usize)> {
    let weights = Tensor::new(targets.iter().map(|t| t.weight).collect::<Vec<_>>(), scores.device())?;
    let (log_probs, correct) = dense_log_probs(scores, targets)?;
    Ok(((log_probs * weights)?.sum_all()?.neg()?, correct))
}
