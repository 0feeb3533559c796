//! The low-rank experts of one linear: expert e adds `s · B_e A_e x`, with `A_e: (r, in)`, `B_e: (out, r)`,
//! `s = alpha / r`.

use candle_core::{Result, Tensor};

use super::router::{Choice, Routing};
use crate::model::ops::{grouped_low_rank, trained_linear};

pub struct Experts {
    /// A and B of each.
    pub pairs: Vec<(Tensor, Tensor)>,
    pub scale: f64,
}

impl Experts {
    /// Each pair's change: `(pairs, in) → (pairs, out)`, both in the routing's order.
    pub fn each(&self, x: &Tensor, routing: &Routing) -> Result<Tensor> {
        let (a, b): (Vec<&Tensor>, Vec<&Tensor>) = self.pairs.iter().map(|(a, b)| (a, b)).unzip();
        let (a, b) = (Tensor::stack(&a, 0)?, Tensor::stack(&b, 0)?);
        grouped_low_rank(x, &a, &b, routing.counts(), self.scale as f32)
    }

    /// `Σ_e w_e · s · B_e A_e x` of all experts in two products: `(rows, in) → (rows, out)`.
    pub fn all(&self, x: &Tensor, choice: &Choice) -> Result<Tensor> {
        let (a, b): (Vec<&Tensor>, Vec<&Tensor>) = self.pairs.iter().map(|(a, b)| (a, b)).unzip();
        let u = trained_linear(x, &Tensor::cat(&a, 0)?)?; // (rows, E·r)
        let (rows, width) = u.dims2()?;
        let weights = choice.weights.unsqueeze(2)?.affine(self.scale, 0.0)?; // (rows, E, 1)
        let u = u.reshape((rows, self.pairs.len(), width / self.pairs.len()))?.broadcast_mul(&weights)?;
        trained_linear(&u.reshape((rows, width))?, &Tensor::cat(&b, 1)?)
    }
}
