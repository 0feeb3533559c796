//! Gradients as plain numbers, clipping, and AdamW in PyTorch's form and precision (f32).
//!
//! `w ← w(1−ηλ)`; `m ← m + (1−β₁)(g−m)`; `v ← β₂v + (1−β₂)g²`;
//! `w ← w − η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)`

use candle_core::{Result, Tensor, Var, backprop::GradStore};

use crate::methods::Trainable;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// The gradient of one optimiser step, summed over its micro-batches.
pub struct Gradient {
    pub values: Vec<Vec<f32>>,
}

impl Gradient {
    pub fn zero(variables: &[(String, Var)]) -> Self {
        Self { values: variables.iter().map(|(_, variable)| vec![0.0; variable.elem_count()]).collect() }
    }

    /// Adds what a backward pass found. A variable that the pass did not reach adds nothing.
    pub fn add(&mut self, variables: &[(String, Var)], found: &GradStore) -> Result<()> {
        for (sum, (_, variable)) in self.values.iter_mut().zip(variables) {
            let Some(gradient) = found.get(variable.as_tensor()) else { continue };
            let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
            sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
        }
        Ok(())
    }

    /// The joint L2 norm. Not finite when any value is not.
    pub fn norm(&self) -> f64 {
        let squares = self.values.iter().flatten().map(|g| f64::from(*g) * f64::from(*g));
        squares.sum::<f64>().sqrt()
    }

    /// Scales by `min(1, limit / (norm + 1e-6))`; a limit of 0 leaves it as it is.
    pub fn clip(&mut self, norm: f64, limit: f64) {
        let coefficient = limit / (norm + 1e-6);
        if limit > 0.0 && coefficient < 1.0 {
            self.values.iter_mut().flatten().for_each(|g| *g *= coefficient as f32);
        }
    }
}

/// The moments of one variable.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    pub m: Vec<f32>,
    pub v: Vec<f32>,
}

pub struct AdamW {
    pub moments: Vec<Moments>,
    pub weight_decay: f64,
}

impl AdamW {
    pub fn new(variables: &[(String, Var)], weight_decay: f64) -> Self {
        let zero = |variable: &Var| vec![0.0; variable.elem_count()];
        let moments = variables.iter().map(|(_, var)| Moments { m: zero(var), v: zero(var) }).collect();
        Self { moments, weight_decay }
    }

    /// Step `t`, from 1. The method says how fast each variable learns. Weight decay shrinks every variable, as one
    /// parameter group of PyTorch's does: it is 0 unless the job asks for it.
    pub fn update(
        &mut self,
        variables: &[(String, Var)],
        gradient: &Gradient,
        step: Step,
        method: &dyn Trainable,
    ) -> Result<()> {
        for (i, (name, variable)) in variables.iter().enumerate() {
            let mut weights = variable.flatten_all()?.to_vec1::<f32>()?;
            let step = Step { rate: step.rate * method.rate(name), ..step };
            step.apply(&mut weights, &gradient.values[i], &mut self.moments[i], self.weight_decay);
            variable.set(&Tensor::from_vec(weights, variable.shape(), variable.device())?)?;
        }
        Ok(())
    }
}

/// Where an update stands.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// From 1.
    pub t: u64,
    pub rate: f64,
}

impl Step {
    fn apply(self, weights: &mut [f32], gradient: &[f32], moments: &mut Moments, decay: f64) {
        let t = self.t as f64;
        let shrink = (1.0 - self.rate * decay) as f32;
        let size = (self.rate / (1.0 - BETA1.powf(t))) as f32;
        let root = (1.0 - BETA2.powf(t)).sqrt() as f32;
        let (one_less_beta1, beta2) = ((1.0 - BETA1) as f32, BETA2 as f32);
        let (one_less_beta2, epsilon) = ((1.0 - BETA2) as f32, EPSILON as f32);
        let moments = moments.m.iter_mut().zip(&mut moments.v);
        for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(moments) {
            *w *= shrink;
            *m += one_less_beta1 * (g - *m);
            *v = *v * beta2 + one_less_beta2 * g * g;
            *w -= size * (*m / (v.sqrt() / root + epsilon));
        }
    }
}
