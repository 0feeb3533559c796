//! Cross entropy of the output layer over chosen rows, in chunks: the scores of all rows are never there at once.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{frozen_linear, is_composed, log_probs::dense_log_probs, output, slice, tensor};
use crate::model::{Target, chunked, kernels::Mat, kernels::elementwise, weight::Weight};

/// Rows whose scores are held at once.
const CHUNK: usize = 128;

struct CrossEntropy {
    weight: Arc<Weight>,
    targets: Vec<Target>,
    with_gradient: bool,
    correct: Arc<AtomicUsize>,
    /// The gradient for the hidden rows, made in the forward pass while the scores are there.
    gradient: Mutex<Option<Vec<f32>>>,
}

/// `Σ weight · −log softmax(h Wᵀ)[token]` over the targets, as a scalar, and how many tokens are the argmax.
/// Its backward can run once.
pub fn cross_entropy(hidden: &Tensor, weight: &Arc<Weight>, targets: &[Target]) -> Result<(Tensor, usize)> {
    if is_composed(hidden) {
        return chunked::cross_entropy(hidden, &[], targets, |_, x| frozen_linear(x, weight));
    }
    let correct = Arc::new(AtomicUsize::new(0));
    let op = CrossEntropy {
        weight: weight.clone(),
        targets: targets.to_vec(),
        with_gradient: hidden.track_op(),
        correct: correct.clone(),
        gradient: Mutex::new(None),
    };
    let loss = hidden.contiguous()?.apply_op1(op)?;
    Ok((loss, correct.load(Ordering::Relaxed)))
}

/// Turns one row of scores into its gradient; returns `(−log p(token), is argmax)`.
pub(super) fn row_loss(scores: &mut [f32], target: &Target) -> (f64, bool) {
    let token = target.token as usize;
    let score = scores[token];
    let is_best = scores.iter().enumerate().all(|(i, x)| *x < score || (*x == score && i >= token));
    let log_sum = elementwise::softmax(scores);
    scores[token] -= 1.0;
    scores.iter_mut().for_each(|x| *x *= target.weight);
    (f64::from(log_sum) - f64::from(score), is_best)
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (hidden, (rows, h)) = (slice(storage, layout)?, layout.shape().dims2()?);
        let vocab = self.weight.rows;
        if let Some(bad) = self.targets.iter().find(|t| t.row >= rows || t.token as usize >= vocab) {
            candle_core::bail!("cross entropy: target {bad:?} is outside {rows} rows and {vocab} tokens");
        }
        let mut gradient = vec![0.0; if self.with_gradient { hidden.len() } else { 0 }];
        let (mut loss, mut correct) = (0f64, 0);
        for targets in self.targets.chunks(CHUNK) {
            let n = targets.len();
            let x: Vec<f32> = targets.iter().flat_map(|t| &hidden[t.row * h..(t.row + 1) * h]).copied().collect();
            let mut scores = self.weight.product(Mat::new(&x, n, h));
            let losses: Vec<(f64, bool)> =
                scores.par_chunks_mut(vocab).zip(targets).map(|(row, target)| row_loss(row, target)).collect();
            for ((nll, is_best), target) in losses.into_iter().zip(targets) {
                loss += nll * f64::from(target.weight);
                correct += usize::from(is_best);
            }
            if self.with_gradient {
                let dx = self.weight.product_back(Mat::new(&scores, n, vocab));
                for (target, dx) in targets.iter().zip(dx.chunks(h)) {
                    let row = &mut gradient[target.row * h..(target.row + 1) * h];
                    row.iter_mut().zip(dx).for_each(|(g, d)| *g += d);
                }
            }
        }
        self.correct.store(correct, Ordering::Relaxed);
        if self.with_gradient {
            *self.gradient.lock().unwrap_or_else(|e| e.into_inner()) = Some(gradient);
        }
        output(vec![loss as f32], ())
    }

    fn bwd(&self, hidden: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let taken = self.gradient.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(mut gradient) = taken else {
            candle_core::bail!("cross entropy: backward ran before, or has no gradient")
        };
        let scale = g.to_scalar::<f32>()?;
        gradient.iter_mut().for_each(|x| *x *= scale);
        Ok(Some(tensor(gradient, hidden.shape())?))
    }
}

/// The same over scores that are there already, `(rows, vocab)`, from candle's own ops.
pub fn dense_cross_entropy(scores: &Tensor, targets: &[Target]) -> Result<(Tensor, usize)> {
    let weights = Tensor::new(targets.iter().map(|t| t.weight).collect::<Vec<_>>(), scores.device())?;
    let (log_probs, correct) = dense_log_probs(scores, targets)?;
    Ok(((log_probs * weights)?.sum_all()?.neg()?, correct))
}
