//! The ops made of candle's own, for devices that our kernels do not run on (CUDA), and what the tests hold the
//! kernels against. Shapes are those of the fused ops; any float type, any device.
//!
//! Frozen numbers come as tensors here: on a device they stay there (`Weight::on`). A method's tensors are in the
//! host's memory, with their optimiser, and are taken to the rows' device by each op that uses them.

use std::ops::Range;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, D, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage,
};

use super::{Activation, Attention, Span};

/// `y = x Wᵀ` with W frozen. candle's own product would make W's gradient too, as large as W.
struct Frozen(Tensor);

impl Frozen {
    fn product<S: BackendStorage>(&self, x: &S, layout: &Layout, w: &S, w_layout: &Layout) -> Result<(S, Shape)> {
        let ((m, k), (n, kw)) = (layout.shape().dims2()?, w_layout.shape().dims2()?);
        if k != kw {
            candle_core::bail!("frozen linear: rows of {k}, not of {kw}");
        }
        let y = match x.dtype() == w.dtype() {
            true => x.matmul(w, (1, m, n, k), layout, &w_layout.transpose(0, 1)?)?,
            false => {
                let narrowed = x.to_dtype(layout, w.dtype())?;
                let y = narrowed.matmul(w, (1, m, n, k), &Layout::contiguous((m, k)), &w_layout.transpose(0, 1)?)?;
                y.to_dtype(&Layout::contiguous((m, n)), x.dtype())?
            }
        };
        Ok((y, (m, n).into()))
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "composed-frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (w, w_layout) = self.0.storage_and_layout();
        match &*w {
            Storage::Cpu(w) => self.product(x, layout, w, w_layout),
            _ => candle_core::bail!("frozen linear: the weight is on another device"),
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (w, w_layout) = self.0.storage_and_layout();
        match &*w {
            Storage::Cuda(w) => self.product(x, layout, w, w_layout),
            _ => candle_core::bail!("frozen linear: the weight is on another device"),
        }
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let dx = g.contiguous()?.to_dtype(self.0.dtype())?.matmul(&self.0)?;
        Ok(Some(dx.to_dtype(x.dtype())?))
    }
}

/// `(m, in) → (m, out)`; W is `(out, in)`, and the product is made in its type.
pub fn frozen_linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.contiguous()?.apply_op1(Frozen(w.clone()))?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
        None => Ok(y),
    }
}

pub fn low_rank_delta(x: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    let device = x.device();
    x.matmul(&a.to_device(device)?.t()?)?.matmul(&b.to_device(device)?.t()?)? * f64::from(scale)
}

/// `counts` rows of x for each expert.
pub fn grouped_low_rank(x: &Tensor, a: &Tensor, b: &Tensor, counts: &[usize], scale: f32) -> Result<Tensor> {
    if a.dim(0)? != counts.len() || counts.iter().sum::<usize>() != x.dim(0)? {
        candle_core::bail!("grouped low-rank: {counts:?} rows of {} for {} experts", x.dim(0)?, a.dim(0)?);
    }
    let (mut parts, mut start) = (Vec::new(), 0);
    for (expert, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        parts.push(low_rank_delta(&x.narrow(0, start, *count)?, &a.get(expert)?, &b.get(expert)?, scale)?);
        start += count;
    }
    Tensor::cat(&parts, 0)
}

pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let n = weight.dim(0)?;
    let groups = x.reshape((x.elem_count() / n, n))?;
    let root = (groups.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
    groups.broadcast_div(&root)?.broadcast_mul(&weight.to_dtype(x.dtype())?)?.reshape(x.shape())
}

/// candle's `gelu` is the tanh form.
pub fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Silu => gate.silu()? * up,
        Activation::Gelu => gate.gelu()? * up,
    }
}

/// `cos, sin: (rows, pairs)`; what stands behind the pairs of a head is not turned.
pub fn rope(x: &Tensor, [cos, sin]: [&Tensor; 2], head_dim: usize) -> Result<Tensor> {
    let ((rows, width), pairs) = (x.dims2()?, cos.dim(1)?);
    let angle = |a: &Tensor| a.to_dtype(x.dtype())?.unsqueeze(1);
    let (cos, sin) = (angle(cos)?, angle(sin)?);
    let heads = x.reshape((rows, width / head_dim, head_dim))?;
    let (low, high) = (heads.narrow(2, 0, pairs)?, heads.narrow(2, pairs, pairs)?);
    let turned_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let turned_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    let still = heads.narrow(2, 2 * pairs, head_dim - 2 * pairs)?;
    let parts = if still.dim(2)? == 0 { vec![turned_low, turned_high] } else { vec![turned_low, turned_high, still] };
    Tensor::cat(&parts, 2)?.reshape((rows, width))
}

/// With a gate `(rows, 1)`, prefix keys and values count `gate · k` and `gate · v` for a row's query.
pub fn attention([q, k, v]: [&Tensor; 3], gate: Option<&Tensor>, shape: &Attention, spans: &[Span]) -> Result<Tensor> {
    let outputs = spans.iter().map(|span| attend([q, k, v], gate, shape, span)).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&outputs, 0)
}

fn attend([q, k, v]: [&Tensor; 3], gate: Option<&Tensor>, shape: &Attention, span: &Span) -> Result<Tensor> {
    let (m, n, d) = (span.queries.len(), span.seen(), shape.head_dim);
    let heads_of = |x: &Tensor, rows: &Range<usize>, heads: usize| -> Result<Tensor> {
        x.narrow(0, rows.start, rows.len())?.reshape((rows.len(), heads, d))?.transpose(0, 1)?.contiguous() // (heads, rows, d)
    };
    let repeated = |x: &Tensor| -> Result<Tensor> {
        let parts = [&span.start, &span.keys].into_iter().filter(|part| !part.is_empty());
        let parts = parts.map(|part| heads_of(x, part, shape.kv_heads)).collect::<Result<Vec<_>>>()?;
        let (x, groups) = (Tensor::cat(&parts, 1)?.unsqueeze(1)?, shape.heads / shape.kv_heads);
        x.broadcast_as((shape.kv_heads, groups, n, d))?.contiguous()?.reshape((shape.heads, n, d)) // (heads, n, d)
    };
    let (q, k, v) = (heads_of(q, &span.queries, shape.heads)?, repeated(k)?, repeated(v)?);
    let scores = (q.matmul(&k.t()?.contiguous()?)? * f64::from(shape.scale))?;
    // A column of the factors is the gate for prefix keys and 1 for text.
    let factors = gate.map(|gate| -> Result<Tensor> {
        let gate = gate.to_dtype(scores.dtype())?.narrow(0, span.queries.start, m)?.broadcast_as((m, span.prefix))?;
        let ones = Tensor::ones((m, n - span.prefix), gate.dtype(), gate.device())?;
        Tensor::cat(&[&gate.contiguous()?, &ones], 1)?.unsqueeze(0) // (1, m, n)
    });
    let factors = factors.transpose()?;
    let scores = match &factors {
        Some(factors) => scores.broadcast_mul(factors)?,
        None => scores,
    };
    let mask = Tensor::from_vec(mask(shape, span), (1, m, n), scores.device())?.to_dtype(scores.dtype())?;
    let scores = scores.broadcast_add(&mask)?; // (heads, m, n)
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let p = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
    let p = match &factors {
        Some(factors) => p.broadcast_mul(factors)?,
        None => p,
    };
    p.matmul(&v)?.transpose(0, 1)?.contiguous()?.reshape((m, shape.heads * d))
}

/// 0 where a query sees a key, −1e30 elsewhere; `(m, n)`.
fn mask(shape: &Attention, span: &Span) -> Vec<f32> {
    let (m, n, past) = (span.queries.len(), span.seen(), span.past());
    let sees = |i: usize, j: usize| {
        let Some(text) = j.checked_sub(span.prefix) else { return true };
        text <= past + i && shape.window.is_none_or(|w| text + w > past + i)
    };
    (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| if sees(i, j) { 0f32 } else { -1e30 }).collect()
}

/// `y + (g − 1) ⊙ (y − b)`
pub fn rescale(y: &Tensor, g: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let product = match bias {
        Some(bias) => y.broadcast_sub(&bias.to_dtype(y.dtype())?)?,
        None => y.clone(),
    };
    y + product.broadcast_mul(&(g.to_device(y.device())? - 1.0)?)?
}
