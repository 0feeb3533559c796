//! Attention of training in bf16: the factors of every product are rounded, sums and the softmax are f32. Scores have a
//! row for each key, so that probabilities are right sides of the products that sum over keys and left sides of those
//! that sum over queries, both without being turned: `out = (Vᵀ P)ᵀ`, `dq = (Kᵀ D)ᵀ`, `dk = D q`, `dv = P g`.

use rayon::prelude::*;

use super::{Attention, Span};
use crate::model::kernels::{
    self, Mat, Out, OutMat,
    bf16::{self, Pair, Rows},
    elementwise,
};

/// Queries whose scores are there at once: whole tiles.
const BLOCK: usize = 64;

/// Keys or values of each span and head, rounded, as left sides.
pub(super) type Sides = Vec<Rows>;

/// Rounded, two rows to one of pairs; an odd one stands beside zeros.
fn pairs(x: Mat) -> Vec<Pair> {
    let mut pairs = vec![[half::bf16::ZERO; 2]; x.rows.div_ceil(2) * x.cols];
    let row = |i: usize| &x.data[i * x.stride..][..x.cols];
    let zeros = vec![0.0; if x.rows.is_multiple_of(2) { 0 } else { x.cols }];
    for (i, pairs) in pairs.chunks_exact_mut(x.cols.max(1)).enumerate() {
        let odd = if 2 * i + 1 < x.rows { row(2 * i + 1) } else { &zeros };
        bf16::interleave(row(2 * i), odd, pairs);
    }
    pairs
}

/// The first `rows` rows of `left · right`.
fn product(left: &Rows, rows: usize, right: Mat) -> Vec<f32> {
    let (pairs, cols) = (pairs(right), right.cols);
    let right = Mat::new(&pairs, right.rows.div_ceil(2), cols);
    // SAFETY: a product without a sum before it writes every number, and the part is all of them.
    unsafe {
        kernels::filled(rows * cols, |out| {
            bf16::nn(left, 0, right, &mut Out::fresh(out, cols).part(0, rows, cols), false);
        })
    }
}

/// `sum += left · right`, both to be rounded.
fn add_product(left: Mat, right: Mat, sum: &mut [f32]) {
    let (pairs, rows) = (pairs(right), left.rows);
    let pairs = Mat::new(&pairs, right.rows.div_ceil(2), right.cols);
    bf16::nn(&Rows::narrow_here(left), 0, pairs, &mut OutMat::of(sum, rows, right.cols), true);
}

/// `keys · xᵀ` of the first `count` keys, a row for each.
fn beside(keys: &Rows, count: usize, x: Mat) -> Vec<f32> {
    product(keys, count, Mat::new(&kernels::transpose(x), x.cols, x.rows))
}

/// Frees sides where they were made: who measures a run's memory counts what its own thread takes and gives back.
pub(super) fn free<const N: usize>(sides: [Sides; N]) {
    sides.into_par_iter().flatten().for_each(drop);
}

impl Attention {
    /// `(keys, d)` of each.
    pub(super) fn row_sides(&self, spans: &[Span], x: &[f32]) -> Sides {
        self.sides(spans, x, Rows::narrow_here)
    }

    /// `(d, keys)` of each.
    pub(super) fn column_sides(&self, spans: &[Span], x: &[f32]) -> Sides {
        self.sides(spans, x, |x| Rows::narrow_here(Mat::new(&kernels::transpose(x), x.cols, x.rows)))
    }

    fn sides(&self, spans: &[Span], x: &[f32], lay: impl Fn(Mat) -> Rows + Sync) -> Sides {
        let (d, width) = (self.head_dim, self.kv_heads * self.head_dim);
        let one = |i: usize| {
            let (span, column) = (&spans[i / self.kv_heads], i % self.kv_heads * d);
            let x: Vec<f32> = span.rows().flat_map(|row| &x[row * width + column..][..d]).copied().collect();
            lay(Mat::new(&x, span.seen(), d))
        };
        (0..spans.len() * self.kv_heads).into_par_iter().map(one).collect()
    }

    fn side(&self, span: usize, head: usize) -> usize {
        span * self.kv_heads + head / (self.heads / self.kv_heads)
    }

    pub(super) fn forward_half(&self, spans: &[Span], [q, k, v]: [&[f32]; 3]) -> Vec<f32> {
        let (d, width) = (self.head_dim, self.heads * self.head_dim);
        let (keys, values) = (self.row_sides(spans, k), self.column_sides(spans, v));
        let mut result = kernels::zeros(q.len());
        let out = Out::new(&mut result, width);
        self.for_each(spans, BLOCK, |s, head, rows| {
            let (span, side, m) = (&spans[s], self.side(s, head), rows.len());
            let (at, seen) = ((span.queries.start + rows.start) * width + head * d, self.seen(span, rows.start, m));
            let mut p = beside(&keys[side], seen.len(), Mat::strided(&q[at..], m, d, width));
            elementwise::softmax_columns(&mut p, m, self.scale, &seen);
            let turned = product(&values[side], d, Mat::new(&p, seen.len(), m));
            // SAFETY: tasks write different rows or columns, and `result` is borrowed until all have ended.
            turn(&turned, &mut unsafe { out.part(at, m, d) }, m, d);
        });
        free([keys, values]);
        result
    }

    /// As `backward_head`; `sides` are rows and columns of all keys, and rows of all values.
    pub(super) fn backward_half(
        &self,
        (s, head): (usize, usize),
        span: &Span,
        [q, g]: [&[f32]; 2],
        sides: &[Sides; 3],
        dq: Out,
        [dk, dv]: &mut [Vec<f32>; 2],
    ) {
        let (d, width, side) = (self.head_dim, self.heads * self.head_dim, self.side(s, head));
        let [keys, turned_keys, values] = sides.each_ref().map(|sides| &sides[side]);
        for first in span.queries.clone().step_by(BLOCK) {
            let m = BLOCK.min(span.queries.end - first);
            let (at, seen) = (first * width + head * d, self.seen(span, first - span.queries.start, m));
            let [q, g] = [q, g].map(|x| Mat::strided(&x[at..], m, d, width));
            let (mut p, mut ds) = (beside(keys, seen.len(), q), beside(values, seen.len(), g));
            elementwise::softmax_columns(&mut p, m, self.scale, &seen);
            elementwise::softmax_columns_backward(&p, &mut ds, m, self.scale);
            let (p, ds) = (Mat::new(&p, seen.len(), m), Mat::new(&ds, seen.len(), m));
            let turned = product(turned_keys, d, ds);
            // SAFETY: a head's columns of a block of queries are this call's alone, and the caller keeps the buffer.
            turn(&turned, &mut unsafe { dq.part(at, m, d) }, m, d);
            add_product(ds, q, dk);
            add_product(p, g, dv);
        }
    }
}

/// `(d, m)` to rows.
fn turn(x: &[f32], out: &mut OutMat, m: usize, d: usize) {
    let rows = kernels::transpose(Mat::new(x, d, m));
    rows.chunks_exact(d).enumerate().for_each(|(i, row)| out.row(i).copy_from_slice(row));
}
