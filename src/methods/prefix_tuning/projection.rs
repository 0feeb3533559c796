//! The reparametrised prefix: `rows = W₂ tanh(W₁ E + b₁) + b₂` with `E: (P, kv)`, `W₁: (e, kv)`, `W₂: (2·L·kv, e)`.
//! As in PEFT, the inner width is that of the keys, not that of the model as in the paper.

use candle_core::{Result, Tensor, Var};

use crate::methods::virtual_tokens::{
    Encoder,
    file::Layout,
    network::{Init, Network, Part},
};

pub struct Projection(Network);

impl Projection {
    /// `is_zero` makes the first rows zero, as PEFT does.
    pub fn new(layout: &Layout, hidden: usize, is_zero: bool, seed: u64) -> Result<Self> {
        let mut last = Part::linear("transform.2", hidden, layout.width);
        if is_zero {
            last.iter_mut().for_each(|part| part.init = Init::Zero);
        }
        let mut parts = vec![Part::new("embedding.weight", [layout.tokens, layout.token_dim], Init::Normal)];
        parts.extend(Part::linear("transform.0", layout.token_dim, hidden));
        parts.extend(last);
        Ok(Self(Network::new(&parts, seed)?))
    }
}

impl Encoder for Projection {
    fn variables(&self) -> Vec<(String, Var)> {
        self.0.variables()
    }

    fn rows(&self, _: Option<u64>) -> Result<Tensor> {
        let x = self.0.linear("transform.0", self.0.get("embedding.weight")?)?.tanh()?;
        self.0.linear("transform.2", &x)
    }
}
