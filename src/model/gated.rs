//! Attention whose prefix is scaled for each query, from candle's own ops (UniPELT's token gates).

use candle_core::{D, Device, Result, Tensor};

use super::ops::{Attention, Span};

/// With gate `g` of a query row: prefix keys and values count `g·k` and `g·v` for that row.
/// `q: (rows, heads·d)`, `k, v: (key rows, kv_heads·d)`, `gate: (rows, 1)`.
pub fn gated_attention([q, k, v]: [&Tensor; 3], gate: &Tensor, shape: &Attention, spans: &[Span]) -> Result<Tensor> {
    let outputs = spans.iter().map(|span| one([q, k, v], gate, shape, span)).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&outputs, 0)
}

fn one([q, k, v]: [&Tensor; 3], gate: &Tensor, shape: &Attention, span: &Span) -> Result<Tensor> {
    let (m, n, d) = (span.queries.len(), span.keys.len(), shape.head_dim);
    let heads_of = |x: &Tensor, start: usize, rows: usize, heads: usize| -> Result<Tensor> {
        x.narrow(0, start, rows)?.reshape((rows, heads, d))?.transpose(0, 1)?.contiguous() // (heads, rows, d)
    };
    let repeated = |x: &Tensor| -> Result<Tensor> {
        let x = heads_of(x, span.keys.start, n, shape.kv_heads)?.unsqueeze(1)?;
        let groups = shape.heads / shape.kv_heads;
        x.broadcast_as((shape.kv_heads, groups, n, d))?.contiguous()?.reshape((shape.heads, n, d)) // (heads, n, d)
    };
    let q = heads_of(q, span.queries.start, m, shape.heads)?;
    let (k, v) = (repeated(k)?, repeated(v)?);
    // A column of the factors is the gate for prefix keys and 1 for text.
    let gate = gate.narrow(0, span.queries.start, m)?.broadcast_as((m, span.prefix))?;
    let ones = Tensor::ones((m, n - span.prefix), gate.dtype(), &Device::Cpu)?;
    let factors = Tensor::cat(&[&gate.contiguous()?, &ones], 1)?.unsqueeze(0)?; // (1, m, n)
    let scores = (q.matmul(&k.t()?.contiguous()?)? * f64::from(shape.scale))?;
    let scores = scores.broadcast_mul(&factors)?.broadcast_add(&mask(shape, span)?)?; // (heads, m, n)
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let p = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
    let out = p.broadcast_mul(&factors)?.matmul(&v)?; // (heads, m, d)
    out.transpose(0, 1)?.contiguous()?.reshape((m, shape.heads * d))
}

/// 0 where a query sees a key, −1e30 elsewhere; `(1, m, n)`.
fn mask(shape: &Attention, span: &Span) -> Result<Tensor> {
    let (m, n) = (span.queries.len(), span.keys.len());
    let past = n - span.prefix - m;
    let sees = |i: usize, j: usize| {
        let Some(text) = j.checked_sub(span.prefix) else { return true };
        text <= past + i && shape.window.is_none_or(|w| text + w > past + i)
    };
    let values = (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| if sees(i, j) { 0f32 } else { -1e30 });
    Tensor::from_vec(values.collect::<Vec<_>>(), (1, m, n), &Device::Cpu)
}
