//! A factor for each column of a linear's output, its bias aside.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{composed, graph::node, is_composed, tensor, with};
use crate::model::kernels::by_chunks;

/// Rows that one task takes.
const ROWS: usize = 16;

/// `y + (g − 1) ⊙ (y − b)`: the product in `y: (rows, out)` times `g: (out)`, the bias as it was. Where g is 1, y to
/// the bit. Gradients for both.
pub fn rescale(y: &Tensor, g: &Tensor, bias: Option<&Arc<[f32]>>) -> Result<Tensor> {
    if is_composed(y) {
        let bias = bias.map(|bias| Tensor::new(&bias[..], y.device())).transpose()?;
        return composed::rescale(y, g, bias.as_ref());
    }
    scaled(y, g, bias, |y, g, b| y + (g - 1.0) * (y - b))
}

/// `y ⊙ g`: each column of `y: (rows, n)` times its factor of `g: (n)`. Gradients for both.
pub fn scale(y: &Tensor, g: &Tensor) -> Result<Tensor> {
    if is_composed(y) {
        return y.broadcast_mul(&g.to_device(y.device())?);
    }
    scaled(y, g, None, |y, g, _| y * g)
}

/// `f` of a number, its column's factor and its bias, whose derivatives are the factor and the number without its bias.
fn scaled(
    y: &Tensor,
    g: &Tensor,
    bias: Option<&Arc<[f32]>>,
    f: impl Fn(f32, f32, f32) -> f32 + Sync,
) -> Result<Tensor> {
    let (m, n) = y.dims2()?;
    if g.elem_count() != n || bias.is_some_and(|bias| bias.len() != n) {
        candle_core::bail!("rescale: {} factors for {n} columns", g.elem_count());
    }
    let (y, g, bias) = (y.contiguous()?, g.contiguous()?, bias.cloned());
    let bias: Arc<[f32]> = bias.unwrap_or_else(|| vec![0.0; n].into());
    let out = with([&y, &g], |[y, g]| {
        Ok(by_chunks(m * n, ROWS * n, |t, out| {
            for (out, y) in out.chunks_mut(n).zip(y[t * ROWS * n..].chunks(n)) {
                for (((out, y), g), b) in out.iter_mut().zip(y).zip(g).zip(&*bias) {
                    *out = f(*y, *g, *b);
                }
            }
        }))
    })?;
    // `dy = g ⊙ d`, `dg = Σ_rows d ⊙ (y − b)`.
    node("rescale", (out, (m, n)), [&y, &g], [&y, &g], move |d, [y, g], _| {
        let mut dg = vec![0.0; n];
        let dy = with([y, g, d], |[y, g, d]| {
            for (y, d) in y.chunks(n).zip(d.chunks(n)) {
                for (((dg, y), d), b) in dg.iter_mut().zip(y).zip(d).zip(&*bias) {
                    *dg += d * (y - b);
                }
            }
            Ok(by_chunks(m * n, ROWS * n, |t, dy| {
                for (dy, d) in dy.chunks_mut(n).zip(d[t * ROWS * n..].chunks(n)) {
                    for ((dy, d), g) in dy.iter_mut().zip(d).zip(g) {
                        *dy = d * g;
                    }
                }
            }))
        })?;
        Ok([Some(tensor(dy, (m, n))?), Some(tensor(dg, n)?)])
    })
}
