//! Causal attention with grouped keys, a sliding window, always-visible prefixes, and sequences side by side.

use std::{ops::Range, sync::Arc};

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::{composed, graph::node, is_composed, tensor, with};
use crate::model::{
    cache::PAGE,
    kernels::{self, Mat, Out, OutMat, elementwise},
    turns::in_parts,
    weight::Compute,
};

mod backward;
mod half;

/// Queries that one task takes at once: whole tiles of the kernels.
const BLOCK: usize = 48;

/// One sequence: its rows among the queries, and its rows among the keys and values: those of a start that it shares
/// with others, if it does, and then its own. Of both together, the first `prefix` are visible to every query; the
/// others are text, and the last query row belongs to the last key row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub queries: Range<usize>,
    pub start: Range<usize>,
    pub keys: Range<usize>,
    pub prefix: usize,
}

impl Span {
    /// How many keys there are.
    pub(super) fn seen(&self) -> usize {
        self.start.len() + self.keys.len()
    }

    /// The keys' rows, in order.
    fn rows(&self) -> impl Iterator<Item = usize> {
        self.start.clone().chain(self.keys.clone())
    }

    /// How many keys of the text stand before the first query's own.
    pub(super) fn past(&self) -> usize {
        self.seen() - self.prefix - self.queries.len()
    }
}

/// Some keys and values of a sequence, all heads in a row.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub rows: usize,
}

/// A span's keys and values as caches have them: the prefix, then pages. Sums are made block by block, so that they are
/// the same with a cache and without. The pages of a shared start end with it.
fn blocks<'a>(k: &'a [f32], v: &'a [f32], width: usize, span: &Span) -> Vec<Block<'a>> {
    let (mut rows, mut prefix) = (Vec::new(), span.prefix);
    for part in [&span.start, &span.keys].into_iter().filter(|part| !part.is_empty()) {
        let text = part.start + std::mem::take(&mut prefix);
        rows.extend(Some(part.start..text).filter(|prefix| !prefix.is_empty()));
        rows.extend((text..part.end).step_by(PAGE).map(|at| at..(at + PAGE).min(part.end)));
    }
    let block = |rows: Range<usize>| {
        let place = rows.start * width..rows.end * width;
        Block { k: &k[place.clone()], v: &v[place], rows: rows.len() }
    };
    rows.into_iter().map(block).collect()
}

/// What queries of one head see.
#[derive(Clone, Copy)]
struct Seen<'a> {
    span: &'a Span,
    blocks: &'a [Block<'a>],
    /// Where the head's columns begin in a row of keys.
    column: usize,
    /// Of each query row of the batch: what the prefix's keys and values count.
    gates: Option<&'a [f32]>,
}

impl Seen<'_> {
    /// The first `bound` keys in their blocks: where each begins, and how many of its rows count.
    fn within(&self, bound: usize) -> impl Iterator<Item = (&Block<'_>, usize, usize)> {
        let mut at = 0;
        self.blocks.iter().map_while(move |block| {
            let (start, n) = (at, block.rows.min(bound - at));
            at += n;
            (n > 0).then_some((block, start, n))
        })
    }
}

/// The shape of an attention layer.
#[derive(Clone, Debug)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// How many text positions back a query sees, itself included; none sees all.
    pub window: Option<usize>,
    /// On the scores of queries and keys.
    pub scale: f32,
    /// What the products of a training step are made in; of a cache's keys and values it is f32.
    pub compute: Compute,
}

impl Attention {
    /// Probabilities of the queries `rows` of a span for the first `bound` keys: `(rows, bound)`.
    fn probabilities(&self, q: Mat, seen: Seen, rows: Range<usize>) -> Vec<f32> {
        let span = seen.span;
        let past = span.past();
        let bound = span.prefix + past + rows.end;
        let mut scores = vec![0.0; rows.len() * bound];
        let out = Out::new(&mut scores, bound);
        for (block, at, n) in seen.within(bound) {
            let k = Mat::strided(&block.k[seen.column..], n, self.head_dim, self.kv_heads * self.head_dim);
            // SAFETY: blocks write different columns, one after another, and `scores` is borrowed by nobody else.
            kernels::nt(q, k, &mut unsafe { out.part(at, rows.len(), n) }, false);
        }
        for (i, row) in scores.chunks_mut(bound).enumerate() {
            let position = past + rows.start + i;
            let visible = span.prefix + position + 1;
            let first = span.prefix + self.window.map_or(0, |w| (position + 1).saturating_sub(w));
            row[..visible].iter_mut().for_each(|x| *x *= self.scale);
            let gate = seen.gates.map(|gates| gates[span.queries.start + rows.start + i]);
            let gated = |row: &mut [f32]| gate.iter().for_each(|g| row[..span.prefix].iter_mut().for_each(|x| *x *= g));
            gated(row);
            row[span.prefix..first].fill(f32::NEG_INFINITY);
            elementwise::softmax(&mut row[..visible]);
            gated(row);
            row[span.prefix..first].fill(0.0);
            row[visible..].fill(0.0);
        }
        scores
    }

    /// The block of one query head: `out = P V`.
    fn head(&self, q: Mat, seen: Seen, rows: Range<usize>, out: &mut OutMat) {
        let p = self.probabilities(q, seen, rows.clone());
        let bound = p.len() / rows.len();
        for (block, at, n) in seen.within(bound) {
            let v = Mat::strided(&block.v[seen.column..], n, self.head_dim, self.kv_heads * self.head_dim);
            kernels::nn(Mat::strided(&p[at..], rows.len(), n, bound), v, out, at > 0);
        }
    }

    /// Where the kernels have no bf16, rounding would only cost time.
    fn is_half(&self) -> bool {
        self.compute == Compute::Bf16 && kernels::bf16::is_native()
    }

    /// Every span, head and block of so many queries, in parallel; on a training thread some at a time.
    fn for_each(&self, spans: &[Span], block: usize, one: impl Fn(usize, usize, &Range<usize>) + Sync) {
        let blocks = |n: usize| (0..n).step_by(block).map(move |at| at..(at + block).min(n));
        let tasks: Vec<_> = (spans.iter().enumerate())
            .flat_map(|(s, span)| (0..self.heads).flat_map(move |h| blocks(span.queries.len()).map(move |b| (s, h, b))))
            .collect();
        let most = spans.iter().map(Span::seen).max().unwrap_or(0);
        in_parts(tasks.len(), block * most * self.work(2), |part| {
            tasks[part].par_iter().for_each(|(s, head, rows)| one(*s, *head, rows));
        });
    }

    /// As long as so many products of two numbers takes a score, which is in some products over a head.
    fn work(&self, products: usize) -> usize {
        products * (self.head_dim + 16)
    }

    /// `blocks` are each span's keys and values.
    fn forward(&self, q: &[f32], spans: &[Span], blocks: &[Vec<Block>], gates: Option<&[f32]>) -> Vec<f32> {
        let (d, width) = (self.head_dim, self.heads * self.head_dim);
        let mut result = kernels::zeros(q.len());
        let out = Out::new(&mut result, width);
        self.for_each(spans, BLOCK, |s, head, rows| {
            let span = &spans[s];
            let at = (span.queries.start + rows.start) * width + head * d;
            let column = head / (self.heads / self.kv_heads) * d;
            // SAFETY: tasks write different rows or columns, and `result` is borrowed until all have ended.
            let mut part = unsafe { out.part(at, rows.len(), d) };
            let q = Mat::strided(&q[at..], rows.len(), d, width);
            self.head(q, Seen { span, blocks: &blocks[s], column, gates }, rows.clone(), &mut part);
        });
        result
    }
}

/// `q: (rows, heads · d)`, `k, v: (key rows, kv_heads · d)`, rotated already; every row is in one span.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: &Attention, spans: &Arc<Vec<Span>>) -> Result<Tensor> {
    if is_composed(q) {
        return composed::attention([q, k, v], None, shape, spans);
    }
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let result = with([&q, &k, &v], |[q, k, v]| {
        if shape.is_half() {
            return Ok(shape.forward_half(spans, [q, k, v]));
        }
        let kv = shape.kv_heads * shape.head_dim;
        let blocks: Vec<Vec<Block>> = spans.iter().map(|span| blocks(k, v, kv, span)).collect();
        Ok(shape.forward(q, spans, &blocks, None))
    })?;
    let (shape, spans) = (shape.clone(), spans.clone());
    node("attention", (result, q.shape()), [&q, &k, &v], [&q, &k, &v], move |g, [q, k, v], _| {
        let [dq, dk, dv] = with([q, k, v, g], |numbers| Ok(shape.backward(&spans, numbers)))?;
        Ok([Some(tensor(dq, q.shape())?), Some(tensor(dk, k.shape())?), Some(tensor(dv, v.shape())?)])
    })
}

/// The same over caches: the blocks that each span sees, in order. `gates` are factors of each query row on the keys and
/// values of its prefix. No gradients. Caches are in the host's memory, whatever the device, and so is this product.
pub fn attend_cached(
    q: &Tensor,
    shape: &Attention,
    spans: &[Span],
    blocks: &[Vec<Block>],
    gates: Option<&[f32]>,
) -> Result<Tensor> {
    let host = q.contiguous()?.to_device(&Device::Cpu)?;
    let result = with([&host], |[data]| Ok(shape.forward(data, spans, blocks, gates)))?;
    tensor(result, q.shape())?.to_device(q.device())
}
