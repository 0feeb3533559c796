//! The gradient of one optimiser step as plain numbers: summed over its micro-batches, measured, clipped.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, Var, backprop::GradStore};
use rayon::prelude::*;

pub struct Gradient {
    pub values: Vec<Vec<f32>>,
}

impl Gradient {
    pub fn zero(variables: &[(String, Var)]) -> Self {
        Self { values: variables.iter().map(|(_, variable)| vec![0.0; variable.elem_count()]).collect() }
    }

    /// Adds what a backward pass found. A variable that the pass did not reach adds nothing.
    pub fn add(&mut self, variables: &[(String, Var)], found: &GradStore) -> Result<()> {
        self.values.par_iter_mut().zip(variables).try_for_each(|(sum, (_, variable))| {
            let Some(gradient) = found.get(variable.as_tensor()) else { return Ok(()) };
            read(gradient, |gradient| sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g))
        })
    }

    /// The joint L2 norm, in one order whatever the threads. Not finite when any value is not.
    pub fn norm(&self) -> f64 {
        let squares = self.values.iter().flatten().map(|g| f64::from(*g) * f64::from(*g));
        squares.sum::<f64>().sqrt()
    }

    /// Scales by `min(1, limit / (norm + 1e-6))`; a limit of 0 leaves it as it is.
    pub fn clip(&mut self, norm: f64, limit: f64) {
        let coefficient = limit / (norm + 1e-6);
        if limit > 0.0 && coefficient < 1.0 {
            self.values.par_iter_mut().flatten().for_each(|g| *g *= coefficient as f32);
        }
    }
}

/// Runs `f` on a tensor's numbers, in the order of its shape.
fn read<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((start, end))) => Ok(f(&cpu.as_slice::<f32>()?[start..end])),
        _ => candle_core::bail!("a gradient is not on the CPU"),
    }
}

/// Runs `f` on a variable's own numbers.
pub fn write(variable: &Var, f: impl FnOnce(&mut [f32])) -> Result<()> {
    struct Write<F>(std::cell::Cell<Option<F>>);

    impl<F: FnOnce(&mut [f32])> InplaceOp1 for Write<F> {
        fn name(&self) -> &'static str {
            "update"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
                candle_core::bail!("a variable is not of contiguous f32")
            };
            if let Some(f) = self.0.take() {
                f(&mut values[start..end]);
            }
            Ok(())
        }
    }

    variable.as_tensor().inplace_op1(&Write(std::cell::Cell::new(Some(f))))
}
