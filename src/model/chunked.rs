//! Cross entropy through an output layer that a method made, without the scores of all rows at once.

use candle_core::{Result, Tensor, Var};

use super::{Target, ops};

/// Rows whose scores are held at once.
const CHUNK: usize = 128;

/// `Σ weight · −log p(token)` over the targets, and how many tokens are the argmax; `scores` makes scores of some
/// hidden rows from the parts. Each chunk's gradients are taken at once on copies of its rows and of the parts, and
/// the loss is tied to what they were copied from: `L + Σ ⟨xᵢ, gᵢ⟩ − ⟨xᵢ, gᵢ⟩`, the last term a constant, has the
/// value L and the gradient gᵢ for xᵢ.
pub fn cross_entropy(
    hidden: &Tensor,
    parts: &[Tensor],
    targets: &[Target],
    scores: impl Fn(&[Tensor], &Tensor) -> Result<Tensor>,
) -> Result<(Tensor, usize)> {
    let sources: Vec<&Tensor> = std::iter::once(hidden).chain(parts).collect();
    let is_tracked = sources.iter().any(|source| source.track_op());
    let copies = parts.iter().map(|part| Var::from_tensor(&part.detach())).collect::<Result<Vec<_>>>()?;
    let parts: Vec<Tensor> = copies.iter().map(|copy| copy.as_tensor().clone()).collect();
    let detached = hidden.detach();
    let mut gradients: Vec<Option<Tensor>> = vec![None; sources.len()];
    let (mut loss, mut correct) = (0f64, 0);
    for targets in targets.chunks(CHUNK) {
        let rows = Tensor::new(targets.iter().map(|t| t.row as u32).collect::<Vec<_>>(), hidden.device())?;
        let x = Var::from_tensor(&detached.index_select(&rows, 0)?)?;
        let local: Vec<Target> = targets.iter().enumerate().map(|(row, target)| Target { row, ..*target }).collect();
        let (part, hits) = ops::dense_cross_entropy(&scores(&parts, &x)?, &local)?;
        loss += f64::from(part.to_scalar::<f32>()?);
        correct += hits;
        if !is_tracked {
            continue;
        }
        let found = part.backward()?;
        if let Some(dx) = found.get(&x) {
            let all = match gradients[0].take() {
                Some(sum) => sum,
                None => detached.zeros_like()?,
            };
            gradients[0] = Some(all.index_add(&rows, &dx.contiguous()?, 0)?);
        }
        for (sum, copy) in gradients[1..].iter_mut().zip(&copies) {
            let Some(gradient) = found.get(copy) else { continue };
            *sum = Some(match sum.take() {
                Some(sum) => (sum + gradient)?,
                None => gradient.clone(),
            });
        }
    }
    let mut tied = Tensor::new(loss as f32, hidden.device())?;
    for (source, gradient) in sources.into_iter().zip(gradients) {
        let Some(gradient) = gradient.filter(|_| source.track_op()) else { continue };
        let product = (source * gradient.detach())?.sum_all()?;
        tied = (tied + (&product - product.detach())?)?;
    }
    Ok((tied, correct))
}
