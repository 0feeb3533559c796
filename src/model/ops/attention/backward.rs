//! Gradients of attention. Scores are made anew, a column for each query, so that all products but one read rows of
//! what they multiply: with `S = K qᵀ`, `P = softmax(S)` and `D = P ⊙ (V gᵀ − Σ P ⊙ V gᵀ)`, columns by columns,
//! `dq = Dᵀ K`, `dk = D q`, `dv = P g`.

use std::ops::Range;

use rayon::prelude::*;

use super::{Attention, Span, half::free};
use crate::model::{
    kernels::{self, Mat, Out, OutMat, elementwise},
    turns::in_parts,
};

/// Queries whose scores are there at once.
const BLOCK: usize = 32;

impl Attention {
    /// `dq`, `dk` and `dv`. Query heads are tasks of their own; what they give to the keys that they share is added in
    /// their order, whoever was first.
    pub(super) fn backward(&self, spans: &[Span], [q, k, v, g]: [&[f32]; 4]) -> [Vec<f32>; 3] {
        let (d, kv) = (self.head_dim, self.kv_heads * self.head_dim);
        let (mut dq, mut dk, mut dv) = (kernels::zeros(q.len()), kernels::zeros(k.len()), kernels::zeros(v.len()));
        let out = Out::new(&mut dq, self.heads * d);
        // Made here, since who measures a run's memory counts what its own thread takes and gives back.
        let zeros = |s: usize| [(); 2].map(|()| vec![0.0; spans[s].seen() * d]);
        let heads = (0..spans.len()).flat_map(|s| (0..self.heads).map(move |head| (s, head)));
        let mut parts: Vec<_> = heads.map(|(s, head)| (s, head, zeros(s))).collect();
        let rounded = || [self.row_sides(spans, k), self.column_sides(spans, k), self.row_sides(spans, v)];
        let halves = self.is_half().then(rounded);
        let one = |(s, head, sums): &mut (usize, usize, [Vec<f32>; 2])| match &halves {
            Some(sides) => self.backward_half((*s, *head), &spans[*s], [q, g], sides, out, sums),
            None => self.backward_head(*head, &spans[*s], [q, k, v, g], out, sums),
        };
        let most = spans.iter().map(|span| span.seen() * span.queries.len()).max().unwrap_or(0);
        in_parts(parts.len(), most * self.work(5) / 2, |some| parts[some].par_iter_mut().for_each(one));
        if let Some(sides) = halves {
            free(sides);
        }
        for (s, head, parts) in parts {
            let column = head / (self.heads / self.kv_heads) * d;
            for (sums, part) in [&mut dk, &mut dv].into_iter().zip(parts) {
                for (row, part) in spans[s].rows().zip(part.chunks_exact(d)) {
                    let sums = &mut sums[row * kv + column..][..d];
                    sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
            }
        }
        [dq, dk, dv]
    }

    /// One query head's `dq` through `Out`, and its part of `dk` and `dv`, zeros before: `(keys, d)` each.
    fn backward_head(
        &self,
        head: usize,
        span: &Span,
        [q, k, v, g]: [&[f32]; 4],
        dq: Out,
        [dk, dv]: &mut [Vec<f32>; 2],
    ) {
        let (d, width, kv) = (self.head_dim, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let column = head / (self.heads / self.kv_heads) * d;
        // Keys that do not stand one behind another are put there.
        let row = |x: &[f32], row: usize| x[row * kv + column..][..d].to_vec();
        let gathered: Option<[Vec<f32>; 2]> =
            (!span.start.is_empty()).then(|| [k, v].map(|x| span.rows().flat_map(|at| row(x, at)).collect()));
        let ([k, v], stride) = match &gathered {
            Some([k, v]) => ([&k[..], &v[..]], d),
            None => ([k, v].map(|x| &x[span.keys.start * kv + column..]), kv),
        };
        for first in span.queries.clone().step_by(BLOCK) {
            let m = BLOCK.min(span.queries.end - first);
            let seen = self.seen(span, first - span.queries.start, m);
            let bound = seen.len();
            let (k, v) = (Mat::strided(k, bound, d, stride), Mat::strided(v, bound, d, stride));
            let at = first * width + head * d;
            let (q, g) = (Mat::strided(&q[at..], m, d, width), Mat::strided(&g[at..], m, d, width));
            let product = |left: Mat, right: Mat| {
                let mut out = vec![0.0; bound * m];
                kernels::nn(
                    left,
                    Mat::new(&kernels::transpose(right), d, m),
                    &mut OutMat::of(&mut out, bound, m),
                    false,
                );
                out
            };
            let (mut p, mut ds) = (product(k, q), product(v, g));
            elementwise::softmax_columns(&mut p, m, self.scale, &seen);
            elementwise::softmax_columns_backward(&p, &mut ds, m, self.scale);
            let (p, ds) = (Mat::new(&p, bound, m), Mat::new(&ds, bound, m));
            // SAFETY: a head's columns of a block of queries are this call's alone, and the caller keeps the buffer.
            kernels::nn(ds.transposed(), k, &mut unsafe { dq.part(at, m, d) }, false);
            kernels::nn(ds, q, &mut OutMat::of(dk, bound, d), true);
            kernels::nn(p, g, &mut OutMat::of(dv, bound, d), true);
        }
    }

    /// For each key up to the last that counts: those of the queries `first..first + m` of a span which see it.
    pub(super) fn seen(&self, span: &Span, first: usize, m: usize) -> Vec<Range<usize>> {
        // The text position of the first of these queries.
        let position = span.past() + first;
        let text = (0..position + m).map(|key| {
            let end = self.window.map_or(m, |window| (key + window).saturating_sub(position).min(m));
            key.saturating_sub(position).min(end)..end
        });
        std::iter::repeat_n(0..m, span.prefix).chain(text).collect()
    }
}
