//! `y = x W'ᵀ + b'` with a W' of the method's own in the place of the frozen one: `dx = g W'`, `dW' = gᵀ x`, `db' = Σ g`.

use candle_core::{Result, Tensor};

use crate::{
    methods::lora::layer::Change,
    model::{Linear, ops},
};

/// One linear's own weights.
pub struct Dense {
    /// `(out, in)`
    pub weight: Tensor,
    /// `(out)`
    pub bias: Option<Tensor>,
}

impl Change for Dense {
    fn forward(&self, x: &Tensor, _: Option<&Tensor>, _: &Linear) -> Result<Tensor> {
        let y = ops::trained_linear(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_device(y.device())?),
            None => Ok(y),
        }
    }

    /// The frozen product of the whole batch is no use to these rows.
    fn adjust(&self, x: &Tensor, dropped: Option<&Tensor>, _: Tensor, base: &Linear) -> Result<Tensor> {
        self.forward(x, dropped, base)
    }

    fn parts(&self) -> Vec<Tensor> {
        [Some(&self.weight), self.bias.as_ref()].into_iter().flatten().cloned().collect()
    }

    fn of_parts(&self, parts: &[Tensor]) -> Self {
        Self { weight: parts[0].clone(), bias: parts.get(1).cloned() }
    }

    fn merged(&self, _: &Tensor) -> Result<Tensor> {
        Ok(self.weight.clone())
    }

    fn merged_bias(&self, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.bias.clone())
    }
}
