//! Log-probabilities of chosen tokens under the output layer, in chunks: the scores of all rows are never there at
//! once. What `cross_entropy` is for one sum, this is for objectives that weigh each token by what all of them say.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{cross_entropy::row_loss, frozen_linear, is_composed, output, slice, tensor, with};
use crate::model::{Target, kernels::Mat, weight::Weight};

/// Rows whose scores are held at once.
const CHUNK: usize = 128;

struct LogProbs {
    weight: Arc<Weight>,
    targets: Vec<Target>,
    with_gradient: bool,
    correct: Arc<AtomicUsize>,
    /// `∂ log p / ∂ hidden row` of each target, `(targets, hidden)`, made in the forward pass while the scores are
    /// there.
    gradients: Mutex<Vec<f32>>,
}

/// `log softmax(h Wᵀ)[token]` of each target, `(targets)`, and how many tokens are the argmax. The targets' weights
/// do not matter.
pub fn log_probs(hidden: &Tensor, weight: &Arc<Weight>, targets: &[Target]) -> Result<(Tensor, usize)> {
    if is_composed(hidden) {
        return dense_log_probs(&frozen_linear(hidden, weight)?, targets);
    }
    let correct = Arc::new(AtomicUsize::new(0));
    let op = LogProbs {
        weight: weight.clone(),
        targets: targets.iter().map(|target| Target { weight: -1.0, ..*target }).collect(),
        with_gradient: hidden.track_op(),
        correct: correct.clone(),
        gradients: Mutex::default(),
    };
    let values = hidden.contiguous()?.apply_op1(op)?;
    Ok((values, correct.load(Ordering::Relaxed)))
}

impl CustomOp1 for LogProbs {
    fn name(&self) -> &'static str {
        "log-probs"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (hidden, (rows, h)) = (slice(storage, layout)?, layout.shape().dims2()?);
        let vocab = self.weight.rows;
        if let Some(bad) = self.targets.iter().find(|t| t.row >= rows || t.token as usize >= vocab) {
            candle_core::bail!("log-probs: target {bad:?} is outside {rows} rows and {vocab} tokens");
        }
        let mut gradients = Vec::with_capacity(if self.with_gradient { self.targets.len() * h } else { 0 });
        let (mut values, mut correct) = (Vec::with_capacity(self.targets.len()), 0);
        for targets in self.targets.chunks(CHUNK) {
            let n = targets.len();
            let x: Vec<f32> = targets.iter().flat_map(|t| &hidden[t.row * h..(t.row + 1) * h]).copied().collect();
            let mut scores = self.weight.product(Mat::new(&x, n, h));
            let losses: Vec<(f64, bool)> =
                scores.par_chunks_mut(vocab).zip(targets).map(|(row, target)| row_loss(row, target)).collect();
            values.extend(losses.iter().map(|(nll, _)| -nll as f32));
            correct += losses.iter().filter(|(_, is_best)| *is_best).count();
            if self.with_gradient {
                gradients.extend(self.weight.product_back(Mat::new(&scores, n, vocab)));
            }
        }
        self.correct.store(correct, Ordering::Relaxed);
        *self.gradients.lock().unwrap_or_else(|e| e.into_inner()) = gradients;
        let n = values.len();
        output(values, n)
    }

    fn bwd(&self, hidden: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let (gradients, (_, h)) = (self.gradients.lock().unwrap_or_else(|e| e.into_inner()), hidden.dims2()?);
        let mut dx = vec![0.0; hidden.elem_count()];
        with([&g.contiguous()?], |[g]| {
            for ((target, part), g) in self.targets.iter().zip(gradients.chunks(h)).zip(g) {
                let row = &mut dx[target.row * h..][..h];
                row.iter_mut().zip(part).for_each(|(x, d)| *x += g * d);
            }
            Ok(())
        })?;
        Ok(Some(tensor(dx, hidden.shape())?))
    }
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
