//! The tensors of a method: their names in its file, their shapes and how they begin.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor, Var};

use crate::domain::rng::Stream;

/// First values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Zero,
    /// In ±1/√n, as PyTorch fills a linear of n inputs.
    Uniform(usize),
    /// With this deviation.
    Normal(f64),
}

#[derive(Clone, Debug)]
pub struct Part {
    pub name: String,
    pub shape: Vec<usize>,
    pub init: Init,
}

impl Part {
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, init: Init) -> Self {
        Self { name: name.into(), shape: shape.into(), init }
    }

    /// Each has random numbers of its own, by its place in the list.
    pub fn first_values(parts: &[Part], seed: u64) -> Vec<Vec<f32>> {
        let streams = parts.iter().zip(0..).map(|(part, place)| (part, Stream::new(seed, place)));
        let values = streams.map(|(part, stream)| {
            let n = part.shape.iter().product();
            match part.init {
                Init::Zero => vec![0.0; n],
                Init::Uniform(inputs) => {
                    let bound = 1.0 / (inputs as f32).sqrt();
                    stream.uniforms(n).map(|u| (2.0 * u - 1.0) * bound).collect()
                }
                Init::Normal(deviation) => stream.normals(n).map(|x| x * deviation as f32).collect(),
            }
        });
        values.collect()
    }

    /// What a file must have.
    pub fn expected(parts: &[Part]) -> Vec<(String, Vec<usize>)> {
        parts.iter().map(|part| (part.name.clone(), part.shape.clone())).collect()
    }
}

/// Tensors by name, to be put in their places.
pub struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    /// Without gradients: to serve.
    pub fn new(parts: &[Part], values: Vec<Vec<f32>>) -> Result<Self> {
        let pairs = parts.iter().zip(values);
        let tensor = |p: &Part, x| Ok((p.name.clone(), Tensor::from_vec(x, p.shape.as_slice(), &Device::Cpu)?));
        pairs.map(|(p, x)| tensor(p, x)).collect::<Result<_>>().map(Self)
    }

    /// They share their memory with the variables.
    pub fn of(variables: &[(String, Var)]) -> Self {
        Self(variables.iter().map(|(name, variable)| (name.clone(), variable.as_tensor().clone())).collect())
    }

    /// With others beside them.
    pub fn with(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    pub fn get(&self, name: &str) -> Result<Tensor> {
        self.0.get(name).cloned().ok_or_else(|| candle_core::Error::Msg(format!("tensor {name} is missing")))
    }
}
