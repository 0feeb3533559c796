//! `y = x Wᵀ` with a frozen W in any storage.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{composed, graph::node, is_composed, tensor, with};
use crate::model::{kernels::Mat, weight::Weight};

/// `(m, in) → (m, out)`; gradient for `x` only: `dx = g W`.
pub fn frozen_linear(x: &Tensor, weight: &Arc<Weight>) -> Result<Tensor> {
    if is_composed(x) {
        return composed::frozen_linear(x, &weight.on(x.device())?, weight.bias_on(x.device())?.as_ref());
    }
    let (x, m, n) = (x.contiguous()?, x.dim(0)?, weight.rows);
    let (y, weight) = (frozen_product(&x, weight)?, weight.clone());
    node("frozen-linear", (y, (m, n)), [&x], [], move |g, [], _| {
        let dx = with([g], |[g]| Ok(weight.product_back(Mat::new(g, m, n))))?;
        Ok([Some(tensor(dx, (m, weight.cols))?)])
    })
}

/// The numbers of `x Wᵀ`, for rows that carry no gradient.
pub fn frozen_product(x: &Tensor, weight: &Arc<Weight>) -> Result<Vec<f32>> {
    if is_composed(x) {
        return frozen_linear(x, weight)?.flatten_all()?.to_vec1();
    }
    let (m, k) = x.dims2()?;
    if k != weight.cols {
        candle_core::bail!("frozen linear: rows of {k}, not of {}", weight.cols);
    }
    with([&x.contiguous()?], |[x]| Ok(weight.product(Mat::new(x, m, k))))
}
