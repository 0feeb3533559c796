//! Prompts and prefixes: trained rows before the text. What makes the rows (plain values, or an encoder) and how the
//! model takes them (as embeddings, or as keys and values) are two things that meet here.

pub mod file;
pub mod network;

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};

use super::{AdapterFiles, MethodError, Start, Trainable};
use crate::{domain::rng::Stream, model::Hook};
use file::{Layout, TENSOR};

/// What makes the rows.
pub trait Encoder: Send + Sync {
    fn variables(&self) -> Vec<(String, Var)>;

    /// `(P, width)`, in the graph of the variables. `train` is the key of the pass's random numbers.
    fn rows(&self, train: Option<u64>) -> Result<Tensor>;
}

/// How the model takes the rows.
pub type Carry = fn(&Tensor, &Layout) -> Result<Arc<dyn Hook>>;

/// The rows themselves are trained.
pub struct Plain(Var);

impl Plain {
    pub fn new(values: Vec<f32>, layout: &Layout) -> Result<Self> {
        Ok(Self(Var::from_tensor(&tensor(values, layout)?)?))
    }
}

impl Encoder for Plain {
    fn variables(&self) -> Vec<(String, Var)> {
        vec![(TENSOR.to_owned(), self.0.clone())]
    }

    fn rows(&self, _: Option<u64>) -> Result<Tensor> {
        Ok(self.0.as_tensor().clone())
    }
}

/// An adapter of virtual tokens while it is trained. Its file holds the rows only, never what made them.
pub struct Training {
    pub encoder: Box<dyn Encoder>,
    pub carry: Carry,
    pub layout: Layout,
    /// `adapter_config.json`
    pub config: Vec<u8>,
}

impl Trainable for Training {
    fn hook(&self, train: Option<u64>) -> Result<Arc<dyn Hook>> {
        (self.carry)(&self.encoder.rows(train)?, &self.layout)
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.encoder.variables()
    }

    fn export(&self) -> std::result::Result<AdapterFiles, MethodError> {
        let values = self.encoder.rows(None)?.flatten_all()?.to_vec1()?;
        Ok(AdapterFiles { config: self.config.clone(), weights: self.layout.write(values) })
    }
}

/// An adapter to serve, from its files.
pub fn load(files: &AdapterFiles, layout: &Layout, carry: Carry) -> std::result::Result<Arc<dyn Hook>, MethodError> {
    Ok(carry(&tensor(layout.read(files)?, layout)?, layout)?)
}

fn tensor(values: Vec<f32>, layout: &Layout) -> Result<Tensor> {
    Tensor::from_vec(values, layout.shape(), &Device::Cpu)
}

/// Token ids drawn from the whole vocabulary.
pub fn sample(start: &Start, n: usize) -> Vec<u32> {
    let stream = Stream::new(start.seed, 0);
    (0..n as u64).map(|place| stream.below(place, start.base.info.vocab as u64) as u32).collect()
}
