//! A factor for each column of a linear's output, its bias aside.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{composed, is_composed, output, slice, tensor, with};

/// Rows that one task takes.
const ROWS: usize = 16;

struct Rescale {
    bias: Option<Arc<[f32]>>,
}

/// `y + (g − 1) ⊙ (y − b)`: the product in `y: (rows, out)` times `g: (out)`, the bias as it was. Where g is 1, y to
/// the bit. Gradients for both.
pub fn rescale(y: &Tensor, g: &Tensor, bias: Option<&Arc<[f32]>>) -> Result<Tensor> {
    if is_composed(y) {
        let bias = bias.map(|bias| Tensor::new(&bias[..], y.device())).transpose()?;
        return composed::rescale(y, g, bias.as_ref());
    }
    y.contiguous()?.apply_op2(&g.contiguous()?, Rescale { bias: bias.cloned() })
}

impl Rescale {
    fn bias(&self, column: usize) -> f32 {
        self.bias.as_ref().map_or(0.0, |bias| bias[column])
    }
}

impl CustomOp2 for Rescale {
    fn name(&self) -> &'static str {
        "rescale"
    }

    fn cpu_fwd(&self, sy: &CpuStorage, ly: &Layout, sg: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let (y, g, (m, n)) = (slice(sy, ly)?, slice(sg, lg)?, ly.shape().dims2()?);
        if g.len() != n || self.bias.as_ref().is_some_and(|bias| bias.len() != n) {
            candle_core::bail!("rescale: {} factors for {n} columns", g.len());
        }
        let mut out = vec![0.0; m * n];
        out.par_chunks_mut(ROWS * n).zip(y.par_chunks(ROWS * n)).for_each(|(out, y)| {
            for (out, y) in out.chunks_mut(n).zip(y.chunks(n)) {
                for (j, ((out, y), g)) in out.iter_mut().zip(y).zip(g).enumerate() {
                    *out = y + (g - 1.0) * (y - self.bias(j));
                }
            }
        });
        output(out, (m, n))
    }

    /// `dy = g ⊙ d`, `dg = Σ_rows d ⊙ (y − b)`.
    fn bwd(&self, y: &Tensor, g: &Tensor, _: &Tensor, d: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (m, n) = y.dims2()?;
        let (mut dy, mut dg) = (vec![0.0; m * n], vec![0.0; n]);
        with([y, g, &d.contiguous()?], |[y, g, d]| {
            dy.par_chunks_mut(n).zip(d.par_chunks(n)).for_each(|(dy, d)| {
                for ((dy, d), g) in dy.iter_mut().zip(d).zip(g) {
                    *dy = d * g;
                }
            });
            for (y, d) in y.chunks(n).zip(d.chunks(n)) {
                for (j, ((dg, y), d)) in dg.iter_mut().zip(y).zip(d).enumerate() {
                    *dg += d * (y - self.bias(j));
                }
            }
            Ok(())
        })?;
        Ok((Some(tensor(dy, (m, n))?), Some(tensor(dg, n)?)))
    }
}
