//! A bidirectional LSTM over one sequence, in plain candle ops (the fused ones have no backward), as `torch.nn.LSTM`
//! has it.
//!
//! For each step: `[i f g o] = x W_ihᵀ + b_ih + h W_hhᵀ + b_hh` with `W_ih: (4e, in)`, `W_hh: (4e, e)`;
//! `c ← σ(f)·c + σ(i)·tanh(g)`, `h ← σ(o)·tanh(c)`. A layer's output is `[h forwards | h backwards]`, `(P, 2e)`, and
//! the input of the next one. Dropout stands between layers, not behind the last.

use candle_core::{Device, Result, Tensor};

use crate::methods::{
    dropout,
    virtual_tokens::network::{Init, Network, Part},
};

pub struct Lstm {
    pub hidden: usize,
    pub layers: usize,
    pub dropout: f64,
}

/// The ends of torch's names for the two directions.
const DIRECTIONS: [&str; 2] = ["", "_reverse"];

impl Lstm {
    /// Its tensors in torch's order.
    pub fn parts(&self, inputs: usize) -> Vec<Part> {
        let (e, init) = (self.hidden, Init::Uniform(self.hidden));
        let one = |layer: usize, direction: &str| {
            let inputs = if layer == 0 { inputs } else { 2 * e };
            let part =
                |name: &str, shape: Vec<usize>| Part::new(format!("lstm_head.{name}_l{layer}{direction}"), shape, init);
            [
                part("weight_ih", vec![4 * e, inputs]),
                part("weight_hh", vec![4 * e, e]),
                part("bias_ih", vec![4 * e]),
                part("bias_hh", vec![4 * e]),
            ]
        };
        (0..self.layers).flat_map(|layer| DIRECTIONS.into_iter().flat_map(move |d| one(layer, d))).collect()
    }

    /// `(P, in) → (P, 2e)`
    pub fn forward(&self, network: &Network, x: &Tensor, train: Option<u64>) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in 0..self.layers {
            if let Some(dropped) = dropout(&x, self.dropout, train.filter(|_| layer > 0), layer as u64)? {
                x = dropped;
            }
            let [forwards, backwards] = DIRECTIONS.map(|d| self.run(network, &x, layer, d));
            x = Tensor::cat(&[forwards?, backwards?], 1)?;
        }
        Ok(x)
    }

    /// One direction of one layer: `(P, e)` in the order of the rows.
    fn run(&self, network: &Network, x: &Tensor, layer: usize, direction: &str) -> Result<Tensor> {
        let (rows, e) = (x.dim(0)?, self.hidden);
        let name = |part: &str| format!("lstm_head.{part}_l{layer}{direction}");
        let inputs = network.affine(x, &name("weight_ih"), &name("bias_ih"))?; // (P, 4e)
        let (weight, bias) = (name("weight_hh"), name("bias_hh"));
        let mut h = Tensor::zeros((1, e), x.dtype(), &Device::Cpu)?;
        let mut c = h.clone();
        let mut outputs = vec![h.clone(); rows];
        for step in 0..rows {
            let row = if direction.is_empty() { step } else { rows - 1 - step };
            let gates = (inputs.narrow(0, row, 1)? + network.affine(&h, &weight, &bias)?)?;
            let gate = |place: usize| gates.narrow(1, place * e, e);
            let (i, f, o) = (sigmoid(&gate(0)?)?, sigmoid(&gate(1)?)?, sigmoid(&gate(3)?)?);
            c = ((f * c)? + (i * gate(2)?.tanh()?)?)?;
            h = (o * c.tanh()?)?;
            outputs[row] = h.clone();
        }
        Tensor::cat(&outputs, 0)
    }
}

/// `σ(x) = (1 + tanh(x/2)) / 2`: no exponential that could overflow, and a gradient everywhere.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    x.affine(0.5, 0.0)?.tanh()?.affine(0.5, 0.5)
}
