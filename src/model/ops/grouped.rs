//! Low-rank changes of several experts, each on its own rows: `y_e = s · (x_e A_eᵀ) B_eᵀ`.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::{composed, is_composed, low_rank::Delta, output, slice, tensor, with};
use crate::model::kernels::Mat;

struct Grouped {
    counts: Vec<usize>,
    scale: f32,
}

/// The first `counts[0]` rows of `x: (m, in)` go through expert 0, the next `counts[1]` through expert 1, and so on,
/// with gradients for `x`, `a: (experts, r, in)` and `b: (experts, out, r)`. One op, because candle's gradient of
/// narrow would make a tensor of all rows for each expert.
pub fn grouped_low_rank(x: &Tensor, a: &Tensor, b: &Tensor, counts: &[usize], scale: f32) -> Result<Tensor> {
    if is_composed(x) {
        return composed::grouped_low_rank(x, a, b, counts, scale);
    }
    x.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, Grouped { counts: counts.to_vec(), scale })
}

/// Sizes of one expert: in, r, out.
#[derive(Clone, Copy)]
struct Sizes([usize; 3]);

impl Sizes {
    fn delta<'a>(self, expert: usize, [a, b]: [&'a [f32]; 2], scale: f32) -> Delta<'a> {
        let [k, r, n] = self.0;
        let (a, b) = (&a[expert * r * k..], &b[expert * n * r..]);
        Delta { a: Mat::new(a, r, k), b: Mat::new(b, n, r), scale }
    }
}

impl Grouped {
    /// Experts that have rows, and which.
    fn groups(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let mut start = 0;
        let ranges = self.counts.iter().map(move |count| {
            start += count;
            start - count..start
        });
        ranges.enumerate().filter(|(_, rows)| !rows.is_empty())
    }
}

impl CustomOp3 for Grouped {
    fn name(&self) -> &'static str {
        "grouped-low-rank"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xl: &Layout,
        sa: &CpuStorage,
        la: &Layout,
        sb: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((m, k), (experts, r, ka)) = (xl.shape().dims2()?, la.shape().dims3()?);
        let (eb, n, rb) = lb.shape().dims3()?;
        let fits = self.counts.len() == experts && self.counts.iter().sum::<usize>() == m;
        if k != ka || r != rb || experts != eb || !fits {
            candle_core::bail!("grouped low-rank: x is ({m}, {k}), A ({experts}, {r}, {ka}), B ({eb}, {n}, {rb})");
        }
        let (x, factors) = (slice(xs, xl)?, [slice(sa, la)?, slice(sb, lb)?]);
        let mut y = vec![0.0; m * n];
        for (expert, rows) in self.groups() {
            let x = Mat::new(&x[rows.start * k..], rows.len(), k);
            Sizes([k, r, n]).delta(expert, factors, self.scale).add(x, &mut y[rows.start * n..rows.end * n]);
        }
        output(y, (m, n))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((m, k), (experts, r, _), n) = (x.dims2()?, a.dims3()?, b.dim(1)?);
        let is_wanted = x.track_op();
        let mut dx = vec![0.0; if is_wanted { m * k } else { 0 }];
        let (mut da, mut db) = (vec![0.0; experts * r * k], vec![0.0; experts * n * r]);
        with([x, a, b, &g.contiguous()?], |[x, a, b, g]| {
            for (expert, rows) in self.groups() {
                let g = Mat::new(&g[rows.start * n..], rows.len(), n);
                let x = Mat::new(&x[rows.start * k..], rows.len(), k);
                let dx = if is_wanted { &mut dx[rows.start * k..rows.end * k] } else { &mut [] };
                let (a, b) = Sizes([k, r, n]).delta(expert, [a, b], self.scale).backward(x, g, dx);
                da[expert * r * k..][..r * k].copy_from_slice(&a);
                db[expert * n * r..][..n * r].copy_from_slice(&b);
            }
            Ok(())
        })?;
        let dx = if is_wanted { Some(tensor(dx, (m, k))?) } else { None };
        Ok((dx, Some(tensor(da, (experts, r, k))?), Some(tensor(db, (experts, n, r))?)))
    }
}
