//! `y = x Wᵀ` with a frozen W in any storage.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{composed, is_composed, output, slice, tensor, with};
use crate::model::{kernels::Mat, weight::Weight};

struct FrozenLinear(Arc<Weight>);

/// `(m, in) → (m, out)`; gradient for `x` only: `dx = g W`.
pub fn frozen_linear(x: &Tensor, weight: &Arc<Weight>) -> Result<Tensor> {
    if is_composed(x) {
        return composed::frozen_linear(x, &weight.on(x.device())?, weight.bias_on(x.device())?.as_ref());
    }
    x.contiguous()?.apply_op1(FrozenLinear(weight.clone()))
}

/// The numbers of `x Wᵀ`, for rows that carry no gradient.
pub fn frozen_product(x: &Tensor, weight: &Arc<Weight>) -> Result<Vec<f32>> {
    if is_composed(x) {
        return frozen_linear(x, weight)?.flatten_all()?.to_vec1();
    }
    let (m, k) = x.dims2()?;
    with([&x.contiguous()?], |[x]| Ok(weight.product(Mat::new(x, m, k))))
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, k) = layout.shape().dims2()?;
        if k != self.0.cols {
            candle_core::bail!("frozen linear: rows of {k}, not of {}", self.0.cols);
        }
        output(self.0.product(Mat::new(slice(storage, layout)?, m, k)), (m, self.0.rows))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let (m, k) = x.dims2()?;
        let dx = with([&g.contiguous()?], |[g]| Ok(self.0.product_back(Mat::new(g, m, self.0.rows))))?;
        Ok(Some(tensor(dx, (m, k))?))
    }
}
