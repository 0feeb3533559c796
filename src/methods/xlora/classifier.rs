//! What decides how much each expert counts for a token (PEFT's `tuners/xlora/classifier.py` and `layer.py`).
//!
//! `h: (rows, hidden)`, the normed hidden rows of the first pass, go through `depth` linears with ReLU and dropout
//! between them to `(rows, E)`, or `(rows, L · E)` where each of the L linears that experts change has weights of its own.
//! Of each E: a softmax at a temperature; the k largest, the others 0; a softmax over what is left.

use candle_core::{D, Result, Tensor};

use crate::{
    domain::XloraSpec,
    methods::{affine::Affine, dropout, top_k::largest},
};

/// The places of its dropout, above the layers' and the routers'.
const PLACES: u64 = 2 << 32;

pub struct Classifier {
    pub layers: Vec<Affine>,
    pub experts: usize,
    pub spec: XloraSpec,
}

impl Classifier {
    /// `(rows, hidden) → (rows, L · E)`, L = 1 where all linears have the same weights.
    pub fn scalings(&self, hidden: &Tensor, train: Option<u64>) -> Result<Tensor> {
        let mut x = hidden.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x)?;
            if i + 1 < self.layers.len() {
                x = x.relu()?;
                x = dropout(&x, self.spec.xlora_dropout_p, train, PLACES | i as u64)?.unwrap_or(x);
            }
        }
        let (rows, width) = x.dims2()?;
        let mut weights = x.reshape((rows * width / self.experts, self.experts))?;
        if self.spec.enable_softmax {
            weights = candle_nn::ops::softmax(&(weights / self.spec.softmax_temperature)?, D::Minus1)?;
        }
        if let Some(k) = self.spec.top_k_lora {
            let mask: Vec<f32> = (weights.to_vec2::<f32>()?.iter())
                .flat_map(|weights| largest(weights, k))
                .map(|kept| f32::from(u8::from(kept)))
                .collect();
            weights = (&weights * Tensor::from_vec(mask, weights.shape(), weights.device())?)?;
        }
        if self.spec.enable_softmax_topk {
            weights = softmax_of_kept(&weights)?;
        }
        weights.reshape((rows, width))
    }
}

/// A softmax over the numbers that are not 0; those stay 0.
fn softmax_of_kept(x: &Tensor) -> Result<Tensor> {
    let kept = x.ne(0f32)?.to_dtype(x.dtype())?;
    // Far below any number, and finite: a row without any kept one comes to 0, not to NaN.
    let lowered = (x + kept.affine(1e30, -1e30)?)?;
    candle_nn::ops::softmax(&lowered, D::Minus1)? * kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn zeros_have_no_part_in_the_softmax() {
        let x = Tensor::new(&[[1f32, 0.0, 1.0], [0.0, 0.0, 0.0], [-2.0, 0.0, 0.0]], &Device::Cpu).unwrap();
        let found = softmax_of_kept(&x).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(found, [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]);
    }
}
