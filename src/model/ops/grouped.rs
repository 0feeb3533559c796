//! Low-rank changes of several experts, each on its own rows: `y_e = s · (x_e A_eᵀ) B_eᵀ`.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::{composed, graph::node, is_composed, low_rank::Delta, tensor, with};
use crate::model::kernels::Mat;

/// The first `counts[0]` rows of `x: (m, in)` go through expert 0, the next `counts[1]` through expert 1, and so on,
/// with gradients for `x`, `a: (experts, r, in)` and `b: (experts, out, r)`. One op, because candle's gradient of
/// narrow would make a tensor of all rows for each expert.
pub fn grouped_low_rank(x: &Tensor, a: &Tensor, b: &Tensor, counts: &[usize], scale: f32) -> Result<Tensor> {
    if is_composed(x) {
        return composed::grouped_low_rank(x, a, b, counts, scale);
    }
    let ((m, k), (experts, r, ka), (eb, n, rb)) = (x.dims2()?, a.dims3()?, b.dims3()?);
    let fits = counts.len() == experts && counts.iter().sum::<usize>() == m;
    if k != ka || r != rb || experts != eb || !fits {
        candle_core::bail!("grouped low-rank: x is ({m}, {k}), A ({experts}, {r}, {ka}), B ({eb}, {n}, {rb})");
    }
    let (x, a, b, groups) = (x.contiguous()?, a.contiguous()?, b.contiguous()?, groups(counts));
    let mut y = vec![0.0; m * n];
    with([&x, &a, &b], |[x, a, b]| {
        for (expert, rows) in &groups {
            let x = Mat::new(&x[rows.start * k..], rows.len(), k);
            let delta = Sizes([k, r, n]).delta(*expert, [a, b], scale);
            delta.add(&delta.shrink(x), &mut y[rows.start * n..rows.end * n]);
        }
        Ok(())
    })?;
    node("grouped-low-rank", (y, (m, n)), [&x, &a, &b], [&x, &a, &b], move |g, [x, a, b], [is_asked, ..]| {
        let mut dx = vec![0.0; if is_asked { m * k } else { 0 }];
        let (mut da, mut db) = (vec![0.0; experts * r * k], vec![0.0; experts * n * r]);
        with([x, a, b, g], |[x, a, b, g]| {
            for (expert, rows) in &groups {
                let g = Mat::new(&g[rows.start * n..], rows.len(), n);
                let x = Mat::new(&x[rows.start * k..], rows.len(), k);
                let dx = if is_asked { &mut dx[rows.start * k..rows.end * k] } else { &mut [] };
                let delta = Sizes([k, r, n]).delta(*expert, [a, b], scale);
                let (a, b) = delta.backward(x, &delta.shrink(x), g, dx);
                da[*expert * r * k..][..r * k].copy_from_slice(&a);
                db[*expert * n * r..][..n * r].copy_from_slice(&b);
            }
            Ok(())
        })?;
        let dx = is_asked.then(|| tensor(dx, (m, k))).transpose()?;
        Ok([dx, Some(tensor(da, (experts, r, k))?), Some(tensor(db, (experts, n, r))?)])
    })
}

/// Experts that have rows, and which.
fn groups(counts: &[usize]) -> Vec<(usize, Range<usize>)> {
    let ends = counts.iter().scan(0, |end, count| {
        *end += count;
        Some(*end - count..*end)
    });
    ends.enumerate().filter(|(_, rows)| !rows.is_empty()).collect()
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
