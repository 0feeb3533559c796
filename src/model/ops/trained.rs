//! `y = x Wᵀ` with a trained W (routers, gates, bottlenecks).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{
    is_composed,
    low_rank::{by_rows, wide},
    output, slice, tensor, with,
};
use crate::model::kernels::{self, Mat};

struct TrainedLinear;

/// `(m, in) → (m, out)` with gradients for `x` and `w: (out, in)`. Unlike a product of candle's, a row's result does
/// not depend on how many rows there are.
pub fn trained_linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if is_composed(x) {
        return x.matmul(&w.to_device(x.device())?.t()?);
    }
    x.contiguous()?.apply_op2(&w.contiguous()?, TrainedLinear)
}

impl CustomOp2 for TrainedLinear {
    fn name(&self) -> &'static str {
        "trained-linear"
    }

    fn cpu_fwd(&self, xs: &CpuStorage, xl: &Layout, ws: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((m, k), (n, kw)) = (xl.shape().dims2()?, wl.shape().dims2()?);
        if k != kw {
            candle_core::bail!("trained linear: rows of {k}, not of {kw}");
        }
        let (x, w) = (slice(xs, xl)?, Mat::new(slice(ws, wl)?, n, k));
        let mut y = vec![0.0; m * n];
        by_rows(m, n, &mut y, |rows, out| {
            kernels::nt(Mat::new(&x[rows.start * k..], rows.len(), k), w, out, false);
        });
        output(y, (m, n))
    }

    /// `dx = g W`, `dW = gᵀ x`
    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((m, k), n) = (x.dims2()?, w.dim(0)?);
        let mut dx = vec![0.0; if x.track_op() { m * k } else { 0 }];
        let mut dw = vec![0.0; n * k];
        with([x, w, &g.contiguous()?], |[x, w, g]| {
            if !dx.is_empty() {
                by_rows(m, k, &mut dx, |rows, out| {
                    kernels::nn(Mat::new(&g[rows.start * n..], rows.len(), n), Mat::new(w, n, k), out, false);
                });
            }
            wide(Mat::new(&kernels::transpose(Mat::new(g, m, n)), n, m), Mat::new(x, m, k), &mut dw, false);
            Ok(())
        })?;
        let dx = if dx.is_empty() { None } else { Some(tensor(dx, (m, k))?) };
        Ok((dx, Some(tensor(dw, (n, k))?)))
    }
}
