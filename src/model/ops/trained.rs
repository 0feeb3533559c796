//! `y = x Wᵀ` with a trained W (routers, gates, bottlenecks).

use candle_core::{Result, Tensor};

use super::{
    graph::node,
    is_composed,
    low_rank::{by_rows, wide},
    tensor, with,
};
use crate::model::kernels::{self, Mat};

/// `(m, in) → (m, out)` with gradients for `x` and `w: (out, in)`. Unlike a product of candle's, a row's result does
/// not depend on how many rows there are.
pub fn trained_linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if is_composed(x) {
        return x.matmul(&w.to_device(x.device())?.t()?);
    }
    let ((m, k), (n, kw)) = (x.dims2()?, w.dims2()?);
    if k != kw {
        candle_core::bail!("trained linear: rows of {k}, not of {kw}");
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    let mut y = vec![0.0; m * n];
    with([&x, &w], |[x, w]| {
        by_rows(m, n, &mut y, |rows, out| {
            kernels::nt(Mat::new(&x[rows.start * k..], rows.len(), k), Mat::new(w, n, k), out, false);
        });
        Ok(())
    })?;
    // `dx = g W`, `dW = gᵀ x`
    node("trained-linear", (y, (m, n)), [&x, &w], [&x, &w], move |g, [x, w], [is_asked, _]| {
        let (mut dx, mut dw) = (vec![0.0; if is_asked { m * k } else { 0 }], vec![0.0; n * k]);
        with([x, w, g], |[x, w, g]| {
            if is_asked {
                by_rows(m, k, &mut dx, |rows, out| {
                    kernels::nn(Mat::new(&g[rows.start * n..], rows.len(), n), Mat::new(w, n, k), out, false);
                });
            }
            wide(Mat::new(&kernels::transpose(Mat::new(g, m, n)), n, m), Mat::new(x, m, k), &mut dw, false);
            Ok(())
        })?;
        let dx = is_asked.then(|| tensor(dx, (m, k))).transpose()?;
        Ok([dx, Some(tensor(dw, (n, k))?)])
    })
}
