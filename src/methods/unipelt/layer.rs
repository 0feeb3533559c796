//! UniPELT's arithmetic (Mao et al., arXiv 2110.07577).
//!
//! With `σ(w·x + b)` a gate of its input x, or the mean of it over the text (`sequence_mean`), in each layer:
//! - `q += gate(h) · B_q A_q h` and the same for v: h is the attention's normed input, the gate stands for alpha/r;
//! - the prefix's keys and values count `gate(h)` times for the query at h, and positions begin at the text;
//! - with s the residual stream and m the feed-forward's output, `u = s + m` and
//!   `s' = u + gate(u) · (W_up ReLU(W_down u + b_down) + b_up)`.
//!
//! The prefix of all layers is `W_2 tanh(W_1 e + b_1) + b_2` of one embedding `e: (P, hidden)`: `(P, 2·L·kv)`, keys of
//! layer l in block 2l, values in block 2l + 1.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::{
    domain::{Site, spec::GateMode},
    methods::affine::Affine,
    model::{
        At, Hook, Linear,
        ops::{add, low_rank_delta},
    },
};

/// `σ(w·x + b)`, `(rows, 1)`; with `sequence_mean` each sequence's mean at all of its rows.
fn gate(mode: GateMode, at: At, affine: &Affine, x: &Tensor) -> Result<Tensor> {
    let gates = candle_nn::ops::sigmoid(&affine.forward(x)?)?;
    if mode != GateMode::SequenceMean {
        return Ok(gates);
    }
    let mut start = 0;
    let means = at.lengths.iter().map(|n| {
        start += n;
        gates.narrow(0, start - n, *n)?.mean_keepdim(0)?.broadcast_as((*n, 1))
    });
    Tensor::cat(&means.collect::<Result<Vec<_>>>()?, 0)
}

pub struct GatedLora {
    pub a: Tensor,
    pub b: Tensor,
    pub gate: Affine,
}

pub struct Layer {
    pub q: GatedLora,
    pub v: GatedLora,
    pub prefix_gate: Affine,
    pub down: Affine,
    pub up: Affine,
    pub bottleneck_gate: Affine,
}

/// What makes the prefix.
pub struct Encoder {
    /// `(P, hidden)`
    pub embedding: Tensor,
    pub inner: Affine,
    pub outer: Affine,
}

impl Encoder {
    /// Keys and values of each layer, `(P, kv)` both.
    pub fn prefixes(&self, layers: usize) -> Result<Vec<(Tensor, Tensor)>> {
        let all = self.outer.forward(&self.inner.forward(&self.embedding)?.tanh()?)?;
        let kv = all.dim(1)? / (2 * layers);
        let block = |i: usize| all.narrow(1, i * kv, kv)?.contiguous();
        (0..layers).map(|layer| Ok((block(2 * layer)?, block(2 * layer + 1)?))).collect()
    }
}

/// The hook of one pass.
pub struct Unipelt {
    pub mode: GateMode,
    pub layers: Arc<Vec<Layer>>,
    pub prefixes: Vec<(Tensor, Tensor)>,
    pub length: usize,
}

impl Hook for Unipelt {
    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, _: &Linear) -> Result<Tensor> {
        let layer = &self.layers[at.layer];
        let lora = match site {
            Site::Q => &layer.q,
            Site::V => &layer.v,
            _ => return Ok(y),
        };
        let change = low_rank_delta(x, &lora.a, &lora.b, 1.0)?;
        add(&y, &change.broadcast_mul(&gate(self.mode, at, &lora.gate, x)?)?)
    }

    fn prefix(&self, layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        Ok(self.prefixes.get(layer).cloned())
    }

    fn prefix_len(&self) -> usize {
        self.length
    }

    fn shifts_positions(&self) -> bool {
        false
    }

    fn sees_ahead(&self) -> bool {
        self.mode == GateMode::SequenceMean
    }

    fn gate(&self, at: At, x: &Tensor) -> Result<Option<Tensor>> {
        gate(self.mode, at, &self.layers[at.layer].prefix_gate, x).map(Some)
    }

    fn after(&self, at: At, x: &Tensor, m: Tensor) -> Result<Tensor> {
        let layer = &self.layers[at.layer];
        let u = add(x, &m)?;
        let change = layer.up.forward(&layer.down.forward(&u)?.relu()?)?;
        add(&m, &change.broadcast_mul(&gate(self.mode, at, &layer.bottleneck_gate, &u)?)?)
    }
}
