//! The small trained networks of encoders, with torch's names, shapes and first values.

use candle_core::{Device, Result, Tensor, Var};

use crate::domain::rng::Stream;

/// How a tensor begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Deviation 1, as torch fills an embedding.
    Normal,
    /// Between ±1/√n, as torch fills a linear of n inputs and an LSTM of n hidden units.
    Uniform(usize),
    Zero,
}

/// One tensor of a network.
pub struct Part {
    pub name: String,
    pub shape: Vec<usize>,
    pub init: Init,
}

impl Part {
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, init: Init) -> Self {
        Self { name: name.into(), shape: shape.into(), init }
    }

    /// Weight `(outputs, inputs)` and bias of a linear.
    pub fn linear(name: &str, inputs: usize, outputs: usize) -> [Self; 2] {
        let init = Init::Uniform(inputs);
        [
            Self::new(format!("{name}.weight"), [outputs, inputs], init),
            Self::new(format!("{name}.bias"), [outputs], init),
        ]
    }
}

/// Trained tensors by name, in a fixed order.
pub struct Network(Vec<(String, Var)>);

impl Network {
    /// Fresh values; each tensor has a stream of the seed.
    pub fn new(parts: &[Part], seed: u64) -> Result<Self> {
        let variable = |(place, part): (u64, &Part)| {
            let (n, stream) = (part.shape.iter().product(), Stream::new(seed, place));
            let values: Vec<f32> = match part.init {
                Init::Normal => stream.normals(n).collect(),
                Init::Uniform(inputs) => {
                    let bound = 1.0 / (inputs as f32).sqrt();
                    stream.uniforms(n).map(|u| (2.0 * u - 1.0) * bound).collect()
                }
                Init::Zero => vec![0.0; n],
            };
            let tensor = Tensor::from_vec(values, part.shape.as_slice(), &Device::Cpu)?;
            Ok((part.name.clone(), Var::from_tensor(&tensor)?))
        };
        Ok(Self((0..).zip(parts).map(variable).collect::<Result<_>>()?))
    }

    pub fn variables(&self) -> Vec<(String, Var)> {
        self.0.clone()
    }

    pub fn get(&self, name: &str) -> Result<&Tensor> {
        match self.0.iter().find(|(known, _)| known == name) {
            Some((_, variable)) => Ok(variable.as_tensor()),
            None => candle_core::bail!("the network has no {name}"),
        }
    }

    /// `x Wᵀ + b`; x: (rows, inputs)
    pub fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        self.affine(x, &format!("{name}.weight"), &format!("{name}.bias"))
    }

    pub fn affine(&self, x: &Tensor, weight: &str, bias: &str) -> Result<Tensor> {
        x.matmul(&self.get(weight)?.t()?)?.broadcast_add(self.get(bias)?)
    }
}
