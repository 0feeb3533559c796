//! AdamW in PyTorch's form and precision (f32), with its moments in f32 or in 8 bits.
//!
//! `w ← w(1−ηλ)`; `m ← m + (1−β₁)(g−m)`; `v ← β₂v + (1−β₂)g²`;
//! `w ← w − η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)`

mod blockwise;
#[cfg(test)]
mod tests;

use candle_core::{Result, Var};
use rayon::prelude::*;

use super::gradient::{Gradient, write};
use crate::{domain::spec::Optimizer, methods::Trainable};
pub use blockwise::{BLOCK, Codes};
use blockwise::{Map, dequantise, quantise};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// Numbers that one task takes; a multiple of [`BLOCK`].
const CHUNK: usize = 64 * BLOCK;

/// Variables with fewer numbers keep their moments in f32 (bitsandbytes' `min_8bit_size`).
pub const LEAST_8BIT: usize = 4096;

/// The moments of one variable.
#[derive(Clone, Debug, PartialEq)]
pub enum Moments {
    Full { m: Vec<f32>, v: Vec<f32> },
    Blockwise { m: Codes, v: Codes },
}

impl Moments {
    fn zero(optimizer: Optimizer, n: usize) -> Self {
        match optimizer {
            Optimizer::Adamw8bit if n >= LEAST_8BIT => {
                Self::Blockwise { m: Codes::zero(n, Map::signed()), v: Codes::zero(n, Map::unsigned()) }
            }
            _ => Self::Full { m: vec![0.0; n], v: vec![0.0; n] },
        }
    }
}

pub struct AdamW {
    pub moments: Vec<Moments>,
    weight_decay: f64,
}

impl AdamW {
    pub fn new(variables: &[(String, Var)], optimizer: Optimizer, weight_decay: f64) -> Self {
        let moments = variables.iter().map(|(_, variable)| Moments::zero(optimizer, variable.elem_count())).collect();
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
        let weight_decay = self.weight_decay;
        let parts = self.moments.par_iter_mut().zip(&gradient.values);
        parts.zip(variables).try_for_each(|((moments, gradient), (name, variable))| {
            let step = Step { rate: step.rate * method.rate(name, step.peak), ..step };
            write(variable, |weights| step.apply(weights, gradient, moments, weight_decay))
        })
    }
}

/// Where an update stands.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// From 1.
    pub t: u64,
    pub rate: f64,
    /// The run's learning rate before its schedule.
    pub peak: f64,
}

impl Step {
    fn apply(self, weights: &mut [f32], gradient: &[f32], moments: &mut Moments, decay: f64) {
        let chunks = weights.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        match moments {
            Moments::Full { m, v } => {
                let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
                chunks.zip(moments).for_each(|((w, g), (m, v))| self.numbers(w, g, m, v, decay));
            }
            Moments::Blockwise { m, v } => {
                let (signed, unsigned) = (Map::signed(), Map::unsigned());
                let moments = m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK));
                chunks.zip(moments).for_each(|((w, g), ((m, m_max), (v, v_max)))| {
                    let blocks = w.chunks_mut(BLOCK).zip(g.chunks(BLOCK));
                    let moments = (m.chunks_mut(BLOCK).zip(m_max)).zip(v.chunks_mut(BLOCK).zip(v_max));
                    for ((w, g), ((m, m_max), (v, v_max))) in blocks.zip(moments) {
                        let (mut whole_m, mut whole_v) = ([0.0; BLOCK], [0.0; BLOCK]);
                        let (whole_m, whole_v) = (&mut whole_m[..w.len()], &mut whole_v[..w.len()]);
                        dequantise(signed, m, *m_max, whole_m);
                        dequantise(unsigned, v, *v_max, whole_v);
                        self.numbers(w, g, whole_m, whole_v, decay);
                        *m_max = quantise(signed, whole_m, m);
                        *v_max = quantise(unsigned, whole_v, v);
                    }
                });
            }
        }
    }

    fn numbers(self, weights: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32], decay: f64) {
        let t = self.t as f64;
        let shrink = (1.0 - self.rate * decay) as f32;
        let size = (self.rate / (1.0 - BETA1.powf(t))) as f32;
        let root = (1.0 - BETA2.powf(t)).sqrt() as f32;
        let (one_less_beta1, beta2) = ((1.0 - BETA1) as f32, BETA2 as f32);
        let (one_less_beta2, epsilon) = ((1.0 - BETA2) as f32, EPSILON as f32);
        for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(m.iter_mut().zip(v)) {
            *w *= shrink;
            *m += one_less_beta1 * (g - *m);
            *v = *v * beta2 + one_less_beta2 * g * g;
            *w -= size * (*m / (v.sqrt() / root + epsilon));
        }
    }
}
