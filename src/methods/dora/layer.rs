//! DoRA's arithmetic (Liu et al., arXiv 2402.09353; PEFT's `tuners/lora/dora.py`).
//!
//! With `n = ‖W + s·BA‖` of each row, a constant in the backward pass (section 4.3), and `g = m / n`:
//!
//! - without dropout: `y = g ⊙ (x Wᵀ + s · (x Aᵀ) Bᵀ) + b`; the bias is not scaled;
//! - with it, `x̃ = drop(x)`: `y = x Wᵀ + b + (g − 1) ⊙ (x̃ Wᵀ) + g ⊙ s · (x̃ Aᵀ) Bᵀ`, so W is multiplied twice.
//!
//! The norms need no `BA`: `n_o² = ‖W_o‖² + 2s · B_o·(A W_oᵀ) + s² · B_o (A Aᵀ) B_oᵀ`.

use candle_core::{Result, Tensor};

use crate::{
    methods::lora::layer::{Change, LowRank},
    model::{Linear, ops},
};

/// One linear's change.
pub struct Decomposed {
    pub low_rank: LowRank,
    /// `m / n`, `(out)`
    pub factors: Tensor,
}

impl Change for Decomposed {
    fn forward(&self, x: &Tensor, dropped: Option<&Tensor>, base: &Linear) -> Result<Tensor> {
        match dropped {
            None => ops::rescale(&self.low_rank.forward(x, None, base)?, &self.factors, base.bias()),
            Some(_) => self.adjust(x, dropped, base.forward(x)?, base),
        }
    }

    fn adjust(&self, x: &Tensor, dropped: Option<&Tensor>, y: Tensor, base: &Linear) -> Result<Tensor> {
        match dropped {
            None => ops::rescale(&self.low_rank.adjust(x, None, y, base)?, &self.factors, base.bias()),
            Some(dropped) => {
                let w = base.forward(dropped)?;
                let all = ops::add(&w, &self.low_rank.delta(dropped)?)?;
                ops::add(&y, &(ops::rescale(&all, &self.factors, base.bias())? - w)?)
            }
        }
    }

    fn parts(&self) -> Vec<Tensor> {
        vec![self.low_rank.a.clone(), self.low_rank.b.clone(), self.factors.clone()]
    }

    fn of_parts(&self, parts: &[Tensor]) -> Self {
        Self { low_rank: self.low_rank.of_parts(parts), factors: parts[2].clone() }
    }

    fn merged(&self, w: &Tensor) -> Result<Tensor> {
        self.low_rank.merged(w)?.broadcast_mul(&self.factors.unsqueeze(1)?)
    }
}

/// `‖W + s·BA‖` of each row of W; `linear` is without its bias.
pub fn norms(linear: &Linear, low_rank: &LowRank) -> Result<Vec<f32>> {
    let (r, inputs) = low_rank.a.dims2()?;
    let (outputs, _) = linear.shape();
    let products = linear.forward(&low_rank.a.detach())?.flatten_all()?.to_vec1::<f32>()?; // A Wᵀ: (r, out)
    let (a, b) = (low_rank.a.flatten_all()?.to_vec1::<f32>()?, low_rank.b.flatten_all()?.to_vec1::<f32>()?);
    let rows: Vec<&[f32]> = a.chunks(inputs).collect();
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let gram: Vec<Vec<f64>> = rows.iter().map(|x| rows.iter().map(|y| dot(x, y)).collect()).collect();
    let (squares, s) = (linear.row_squares(), low_rank.scale);
    let norm = |o: usize| {
        let b = &b[o * r..(o + 1) * r];
        let cross: f64 = (0..r).map(|k| f64::from(b[k]) * f64::from(products[k * outputs + o])).sum();
        let own: f64 = (0..r)
            .flat_map(|k| (0..r).map(move |l| (k, l)))
            .map(|(k, l)| gram[k][l] * f64::from(b[k]) * f64::from(b[l]))
            .sum();
        // A row of zeros has no direction; its product is zero whatever the factor.
        (squares[o] + 2.0 * s * cross + s * s * own).max(1e-30).sqrt() as f32
    };
    Ok((0..outputs).map(norm).collect())
}
