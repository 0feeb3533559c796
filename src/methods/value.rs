//! A value head over any method, for objectives with a critic: `v = h w`, what can still be expected of a text at each
//! of its tokens (`v_head` of TRL's `modeling_value_head.py`, without a bias).
//!
//! `h: (rows, hidden)` are the normed hidden rows of the policy, `w: (1, hidden)`. It is no part of the adapter's files:
//! who serves the policy has no use for it.

use std::sync::Arc;

use candle_core::{DType, Device, Var};

use super::{AdapterFiles, MethodError, Named, Stepped, Trainable};
use crate::model::{Base, Hook};

/// Its name among the variables.
const NAME: &str = "v_head.summary.weight";

struct Training {
    inner: Box<dyn Trainable>,
    head: Var,
    /// The head's learning rate as a multiple of the run's.
    rate: f64,
}

/// Expects nothing at first, so that the first advantages are what was returned.
pub fn over(inner: Box<dyn Trainable>, base: &Base, rate: f64) -> Result<Box<dyn Trainable>, MethodError> {
    let head = Var::zeros((1, base.info.hidden), DType::F32, &Device::Cpu)?;
    Ok(Box::new(Training { inner, head, rate }))
}

impl Trainable for Training {
    fn hook(&self, train: Option<u64>) -> Result<Arc<dyn Hook>, candle_core::Error> {
        self.inner.hook(train)
    }

    fn variables(&self) -> Vec<(String, Var)> {
        let mut variables = self.inner.variables();
        variables.push((NAME.to_owned(), self.head.clone()));
        variables
    }

    fn value_head(&self) -> Option<&Var> {
        Some(&self.head)
    }

    fn rate(&self, name: &str, peak: f64) -> f64 {
        if name == NAME { self.rate } else { self.inner.rate(name, peak) }
    }

    fn stepped(&mut self, step: &Stepped) -> Result<(), MethodError> {
        let gradients = step.gradients.split_last().map_or(step.gradients, |(_, inner)| inner);
        self.inner.stepped(&Stepped { gradients, ..*step })
    }

    fn state(&self) -> Vec<Named> {
        self.inner.state()
    }

    fn restore(&mut self, state: Vec<Named>) -> Result<(), MethodError> {
        self.inner.restore(state)
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        self.inner.export()
    }
}
