//! Dropout that keeps no mask: the backward draws the same one again.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{is_composed, output, slice, tensor, with};
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
    x.contiguous()?.apply_op1(op)
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

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        output(self.apply(slice(storage, layout)?), layout.shape().clone())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let dx = with([&g.contiguous()?], |[g]| Ok(self.apply(g)))?;
        Ok(Some(tensor(dx, x.shape())?))
    }
}
