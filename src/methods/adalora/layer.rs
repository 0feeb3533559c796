//! AdaLoRA's arithmetic (Zhang et al., arXiv 2303.10512; PEFT's `tuners/adalora/layer.py`, `model.py`).
//!
//! `y = base(x) + s · (drop(x) (A ⊙ E)ᵀ) Bᵀ` with `A: (r, in)`, `E: (r, 1)`, `B: (out, r)` and
//! `s = alpha / (init_r + 1e-5)`, whatever rank is left. The loss grows by
//! `orth_reg_weight · mean(‖A Aᵀ − I‖, ‖Bᵀ B − I‖)` over all A and B, Frobenius norms (not squared).

use candle_core::{D, Result, Tensor};

use crate::{
    domain::Site,
    methods::lora::layer::{Adapted, LowRank},
    model::{At, Hook, Linear},
};

/// A, E and B of one linear.
#[derive(Clone)]
pub struct Triplets {
    pub a: Tensor,
    pub e: Tensor,
    pub b: Tensor,
}

impl Triplets {
    /// The same change as LoRA's.
    pub fn low_rank(&self, scale: f64) -> Result<LowRank> {
        Ok(LowRank { a: self.a.broadcast_mul(&self.e)?, b: self.b.clone(), scale })
    }

    /// `‖A Aᵀ − I‖ + ‖Bᵀ B − I‖`
    fn skewness(&self) -> Result<Tensor> {
        let of = |gram: Tensor| -> Result<Tensor> {
            let unit = Tensor::eye(gram.dim(D::Minus1)?, gram.dtype(), gram.device())?;
            (gram - unit)?.sqr()?.sum_all()?.sqrt()
        };
        of(self.a.matmul(&self.a.t()?)?)? + of(self.b.t()?.matmul(&self.b)?)?
    }
}

/// The adapter while it is trained; loaded, it is a LoRA.
pub struct AdaLora {
    pub change: Adapted<LowRank>,
    /// The triplets of modules that have any left.
    pub triplets: Vec<Triplets>,
    /// All targeted modules.
    pub modules: usize,
    pub orth_reg_weight: f64,
    /// Triplets left, a mean over the modules.
    pub mean_rank: f64,
}

impl Hook for AdaLora {
    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        self.change.linear(at, site, x, base)
    }

    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, base: &Linear) -> Result<Tensor> {
        self.change.adjust(at, site, x, y, base)
    }

    fn penalty(&self) -> Result<Option<Tensor>> {
        if self.orth_reg_weight == 0.0 || self.triplets.is_empty() {
            return Ok(None);
        }
        let skewness = self.triplets.iter().map(Triplets::skewness).collect::<Result<Vec<_>>>()?;
        let mean = Tensor::stack(&skewness, 0)?.sum_all()?;
        Ok(Some(mean.affine(self.orth_reg_weight / (2 * self.modules) as f64, 0.0)?))
    }

    fn figures(&self) -> Vec<(String, f64)> {
        vec![("mean_rank".to_owned(), self.mean_rank)]
    }
}
