//! A frozen linear with a low-rank change: `y = x Wᵀ + s · (x Aᵀ) Bᵀ`, and the change alone.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{composed, frozen_linear, graph::node, is_composed, tensor, with};
use crate::model::{
    kernels::{self, Mat, Out, OutMat},
    weight::Weight,
};

/// `x Wᵀ + s · (x Aᵀ) Bᵀ` with gradients for `x: (m, in)`, `a: (r, in)` and `b: (out, r)`.
pub fn low_rank_linear(x: &Tensor, weight: &Arc<Weight>, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    if is_composed(x) {
        return frozen_linear(x, weight)? + composed::low_rank_delta(x, a, b, scale)?;
    }
    changed(x, Some(weight), [a, b], scale)
}

/// `s · (x Aᵀ) Bᵀ`, the same bits as the change inside [`low_rank_linear`].
pub fn low_rank_delta(x: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    if is_composed(x) {
        return composed::low_rank_delta(x, a, b, scale);
    }
    changed(x, None, [a, b], scale)
}

/// With W it is the whole linear; without, the change alone.
fn changed(x: &Tensor, weight: Option<&Arc<Weight>>, [a, b]: [&Tensor; 2], scale: f32) -> Result<Tensor> {
    let ((m, k), (r, ka), (n, rb)) = (x.dims2()?, a.dims2()?, b.dims2()?);
    if k != ka || r != rb || !weight.is_none_or(|w| w.cols == k && w.rows == n) {
        candle_core::bail!("low-rank linear: x is ({m}, {k}), A ({r}, {ka}), B ({n}, {rb})");
    }
    let (x, a, b, weight) = (x.contiguous()?, a.contiguous()?, b.contiguous()?, weight.cloned());
    let (y, u) = with([&x, &a, &b], |[x, a, b]| {
        let (x, delta) = (Mat::new(x, m, k), Delta { a: Mat::new(a, r, k), b: Mat::new(b, n, r), scale });
        let mut y = match &weight {
            Some(weight) => weight.product(x),
            None => kernels::zeros(m * n),
        };
        let u = delta.shrink(x);
        delta.add(&u, &mut y);
        Ok((y, tensor(u, (m, r))?))
    })?;
    // `dx = gW`, and the change's own gradients.
    node("low-rank-linear", (y, (m, n)), [&x, &a, &b], [&x, &a, &b, &u], move |g, [x, a, b, u], [is_asked, ..]| {
        let (dx, da, db) = with([x, a, b, u, g], |[x, a, b, u, g]| {
            let (x, g) = (Mat::new(x, m, k), Mat::new(g, m, n));
            let mut dx = match &weight {
                Some(weight) if is_asked => weight.product_back(g),
                None if is_asked => kernels::zeros(m * k),
                _ => Vec::new(),
            };
            let (da, db) = Delta { a: Mat::new(a, r, k), b: Mat::new(b, n, r), scale }.backward(x, u, g, &mut dx);
            Ok((dx, da, db))
        })?;
        let dx = is_asked.then(|| tensor(dx, (m, k))).transpose()?;
        Ok([dx, Some(tensor(da, (r, k))?), Some(tensor(db, (n, r))?)])
    })
}

/// `out (+)= left · right` in parallel over columns of `right`.
pub(super) fn wide(left: Mat, right: Mat, out: &mut [f32], accumulate: bool) {
    const WIDTH: usize = 192;
    let n = right.cols;
    let part_of = Out::new(out, n);
    (0..n.div_ceil(WIDTH)).into_par_iter().for_each(|t| {
        let (col, width) = (t * WIDTH, WIDTH.min(n - t * WIDTH));
        // SAFETY: tasks write different columns, and `out` is borrowed until all have ended.
        let mut part = unsafe { part_of.part(col, left.rows, width) };
        kernels::nn(left, Mat::strided(&right.data[col..], right.rows, width, right.stride), &mut part, accumulate);
    });
}

/// Rows of `x` in parallel: `f` gets a range of rows and their part of `out`, `width` numbers a row.
pub(super) fn by_rows(m: usize, width: usize, out: &mut [f32], f: impl Fn(std::ops::Range<usize>, &mut OutMat) + Sync) {
    const ROWS: usize = 32;
    out.par_chunks_mut(ROWS * width).enumerate().for_each(|(t, out)| {
        let rows = t * ROWS..(t * ROWS + ROWS).min(m);
        f(rows.clone(), &mut OutMat::of(out, rows.len(), width));
    });
}

/// The change on plain matrices: A is `(r, in)`, B is `(out, r)`.
#[derive(Clone, Copy)]
pub(super) struct Delta<'a> {
    pub a: Mat<'a>,
    pub b: Mat<'a>,
    pub scale: f32,
}

impl Delta<'_> {
    /// `u = s · x Aᵀ`, `(m, r)`
    pub fn shrink(&self, x: Mat) -> Vec<f32> {
        let r = self.a.rows;
        let mut u = vec![0.0; x.rows * r];
        by_rows(x.rows, r, &mut u, |rows, out| {
            kernels::nt(Mat::new(&x.data[rows.start * x.cols..], rows.len(), x.cols), self.a, out, false);
        });
        u.iter_mut().for_each(|u| *u *= self.scale);
        u
    }

    /// `y += u Bᵀ`
    pub fn add(&self, u: &[f32], y: &mut [f32]) {
        let (r, n) = (self.a.rows, self.b.rows);
        wide(Mat::new(u, u.len() / r, r), Mat::new(&kernels::transpose(self.b), r, n), y, true);
    }

    /// With `u = s·xAᵀ` and `v = s·gB`: adds `vA` to `dx` unless that is empty, and gives `dA = vᵀx` and `dB = gᵀu`.
    pub fn backward(&self, x: Mat, u: &[f32], g: Mat, dx: &mut [f32]) -> (Vec<f32>, Vec<f32>) {
        let (m, k, r, n) = (x.rows, x.cols, self.a.rows, self.b.rows);
        let mut v = vec![0.0; m * r];
        by_rows(m, r, &mut v, |rows, out| {
            kernels::nn(Mat::new(&g.data[rows.start * n..], rows.len(), n), self.b, out, false);
        });
        v.iter_mut().for_each(|v| *v *= self.scale);
        if !dx.is_empty() {
            wide(Mat::new(&v, m, r), self.a, dx, true);
        }
        let mut da = vec![0.0; r * k];
        wide(Mat::new(&kernels::transpose(Mat::new(&v, m, r)), r, m), x, &mut da, false);
        let mut dbt = vec![0.0; r * n];
        wide(Mat::new(&kernels::transpose(Mat::new(u, m, r)), r, m), g, &mut dbt, false);
        (da, kernels::transpose(Mat::new(&dbt, r, n)))
    }
}
