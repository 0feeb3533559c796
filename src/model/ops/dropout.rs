//! Dropout that keeps no mask: the backward draws the same one again.

use candle_core::{Result, Tensor};

use super::{graph::node, is_composed, tensor, with};
use crate::{domain::rng::Stream, model::kernels::by_chunks};

/// Numbers that one task takes; a multiple of the four that a stream draws at once.
const CHUNK: usize = 4096;

struct Dropout {
    p: f64,
    stream: Stream,
}

/// `x` with each number dropped with probability `p` and the others scaled by `1/(1−p)`. Which, is the stream's choice
/// for its place.
pub fn dropout(x: &Tensor, p: f64, stream: Stream) -> Result<Tensor> {
    let op = Dropout { p, stream };
    if is_composed(x) {
        let mask = op.apply(&vec![1.0; x.elem_count()]);
        return x * Tensor::from_vec(mask, x.shape(), x.device())?;
    }
    let x = x.contiguous()?;
    let y = with([&x], |[x]| Ok(op.apply(x)))?;
    node("dropout", (y, x.shape()), [&x], [], move |g, [], _| {
        let dx = with([g], |[g]| Ok(op.apply(g)))?;
        Ok([Some(tensor(dx, g.shape())?)])
    })
}

impl Dropout {
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let kept = (1.0 / (1.0 - self.p)) as f32;
        by_chunks(x.len(), CHUNK, |chunk, y| {
            let x = &x[chunk * CHUNK..][..y.len()];
            let uniforms = self.stream.uniforms_from((chunk * CHUNK) as u64, x.len());
            for ((y, x), u) in y.iter_mut().zip(x).zip(uniforms) {
                // A product, so that what is not finite stays so.
                *y = x * if f64::from(u) < self.p { 0.0 } else { kept };
            }
        })
    }
}
