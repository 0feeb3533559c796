//! P-tuning's arithmetic (Liu et al., arXiv 2103.10385; PEFT's `PromptEncoder`): the rows of prompt tuning are made of
//! trained embeddings by a small network, `Z = f(E)` with `E: (P, hidden)`.
//!
//! MLP: `Linear(hidden, e), ReLU, Linear(e, e), ReLU, Linear(e, hidden)`.
//! LSTM: bidirectional of width e, then `Linear(2e, 2e), ReLU, Linear(2e, hidden)`.

use candle_core::{Result, Tensor, Var};

use super::lstm::Lstm;
use crate::{
    domain::{BaseInfo, PTuningSpec, spec::Reparameterization},
    methods::virtual_tokens::{
        Encoder,
        network::{Init, Network, Part},
    },
};

pub struct PromptEncoder {
    network: Network,
    /// None for the MLP.
    lstm: Option<Lstm>,
}

impl PromptEncoder {
    pub fn new(spec: &PTuningSpec, base: &BaseInfo, seed: u64) -> Result<Self> {
        let (h, e) = (base.hidden, spec.hidden_size(base));
        let mut parts = vec![Part::new("embedding.weight", [spec.num_virtual_tokens, h], Init::Normal)];
        let lstm = match spec.encoder_reparameterization_type {
            Reparameterization::Mlp => {
                parts.extend(Part::linear("mlp_head.0", h, e));
                parts.extend(Part::linear("mlp_head.2", e, e));
                parts.extend(Part::linear("mlp_head.4", e, h));
                None
            }
            Reparameterization::Lstm => {
                let lstm = Lstm { hidden: e, layers: spec.encoder_num_layers, dropout: spec.encoder_dropout };
                parts.extend(lstm.parts(h));
                parts.extend(Part::linear("mlp_head.0", 2 * e, 2 * e));
                parts.extend(Part::linear("mlp_head.2", 2 * e, h));
                Some(lstm)
            }
        };
        Ok(Self { network: Network::new(&parts, seed)?, lstm })
    }
}

impl Encoder for PromptEncoder {
    fn variables(&self) -> Vec<(String, Var)> {
        self.network.variables()
    }

    fn rows(&self, train: Option<u64>) -> Result<Tensor> {
        let (network, x) = (&self.network, self.network.get("embedding.weight")?);
        match &self.lstm {
            None => {
                let x = network.linear("mlp_head.0", x)?.relu()?;
                let x = network.linear("mlp_head.2", &x)?.relu()?;
                network.linear("mlp_head.4", &x)
            }
            Some(lstm) => {
                let x = lstm.forward(network, x, train)?;
                let x = network.linear("mlp_head.0", &x)?.relu()?;
                network.linear("mlp_head.2", &x)
            }
        }
    }
}
