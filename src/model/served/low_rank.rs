//! Low-rank changes and factors of frozen linears.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use candle_core::{Device, Result, Tensor};

use super::{
    factor::Factor,
    gate::Gate,
    rows::{ROWS, edit},
};
use crate::model::{
    Compute,
    kernels::{self, Mat, OutMat},
    ops,
};

/// Factors `g: (out)` of a linear's output (DoRA, IA3).
struct Factors {
    g: Vec<f32>,
    /// What is not multiplied.
    bias: Option<Arc<[f32]>>,
}

impl Factors {
    /// The bits of `ops::rescale`: where `g` is 1, `y` stays as it is.
    fn apply(&self, y: &mut [f32]) {
        match &self.bias {
            None => y.iter_mut().zip(&self.g).for_each(|(y, g)| *y += (g - 1.0) * *y),
            Some(bias) => {
                y.iter_mut().zip(self.g.iter().zip(bias.iter())).for_each(|(y, (g, b))| *y += (g - 1.0) * (*y - b))
            }
        }
    }
}

/// `g ⊙ (y + σ(w·x + b) · s · (x Aᵀ) Bᵀ)` with `A: (r, in)`, `B: (out, r)`; r may be 0, and g and the gate be missing.
pub struct LowRank {
    rank: usize,
    inputs: usize,
    outputs: usize,
    scale: f32,
    a: Factor,
    /// Transposed: `(r, out)`.
    b: Factor,
    /// A and B on another device than the CPU, once somebody asked.
    placed: OnceLock<[Tensor; 2]>,
    gate: Option<Gate>,
    factors: Option<Factors>,
}

impl LowRank {
    /// # Panics
    /// If the factors are not of one rank; loaders check before.
    pub(in crate::model) fn new(
        a: Vec<f32>,
        b: &[f32],
        (outputs, inputs): (usize, usize),
        scale: f64,
        compute: Compute,
    ) -> Self {
        let rank = a.len() / inputs;
        assert!(a.len() == rank * inputs && b.len() == rank * outputs, "factors do not fit");
        let b = kernels::transpose(Mat::new(b, outputs, rank));
        let (a, b) = (Factor::new(a, rank, compute), Factor::new(b, rank, compute));
        let (scale, placed) = (scale as f32, OnceLock::new());
        Self { rank, inputs, outputs, scale, a, b, placed, gate: None, factors: None }
    }

    /// `A: (r, in)` and `B: (out, r)` on a device.
    fn on(&self, device: &Device) -> Result<[Tensor; 2]> {
        if let Some(placed) = self.placed.get() {
            return Ok(placed.clone());
        }
        let b = self.b.tensor(self.rank, self.outputs, device)?;
        let placed = [self.a.tensor(self.rank, self.inputs, device)?, b.t()?.contiguous()?];
        Ok(self.placed.get_or_init(|| placed).clone())
    }

    /// With the whole output, but for `bias`, times `g`.
    ///
    /// # Panics
    /// If they are not as many as outputs; loaders check before.
    pub fn rescaled(self, g: Vec<f32>, bias: Option<Arc<[f32]>>) -> Self {
        assert!(g.len() == self.outputs && bias.as_ref().is_none_or(|b| b.len() == g.len()), "factors do not fit");
        Self { factors: Some(Factors { g, bias }), ..self }
    }

    /// With the change of each row times its gate. On the CPU only.
    ///
    /// # Panics
    /// If the gate is not of the input's width; loaders check before.
    pub fn gated(self, gate: Gate) -> Self {
        assert_eq!(gate.weight.len(), self.inputs, "the gate does not fit");
        Self { gate: Some(gate), ..self }
    }

    pub fn bytes(&self) -> usize {
        let factors = self.factors.as_ref().map_or(0, |factors| size_of_val(factors.g.as_slice()));
        self.a.bytes() + self.b.bytes() + factors + self.gate.as_ref().map_or(0, Gate::bytes)
    }

    /// The same on any device, of candle's own operations.
    fn composed(&self, x: &Tensor, y: Tensor) -> Result<Tensor> {
        if self.gate.is_some() {
            candle_core::bail!("a gated change is served on the CPU only");
        }
        let y = if self.rank > 0 {
            let [a, b] = self.on(x.device())?;
            (y + ops::composed::low_rank_delta(x, &a, &b, self.scale)?)?
        } else {
            y
        };
        let Some(Factors { g, bias }) = &self.factors else { return Ok(y) };
        let row = |numbers: &[f32]| Tensor::from_slice(numbers, (1, numbers.len()), x.device());
        match bias {
            None => y.broadcast_mul(&row(g)?),
            Some(bias) => &y + y.broadcast_sub(&row(bias)?)?.broadcast_mul(&(row(g)? - 1.0)?)?,
        }
    }

    fn apply(&self, x: Mat, y: &mut OutMat) {
        if self.rank > 0 {
            match &self.gate {
                None => self.add(x, |_| 1.0, y),
                Some(gate) => self.add(x, |i| gate.of(&x.data[i * x.stride..][..x.cols]), y),
            }
        }
        if let Some(factors) = &self.factors {
            (0..x.rows).for_each(|i| factors.apply(y.row(i)));
        }
    }

    /// `y += weight · s · (x Aᵀ) Bᵀ`, the weight of each row.
    pub fn add(&self, x: Mat, weight: impl Fn(usize) -> f32, y: &mut OutMat) {
        let mut u = vec![0.0; x.rows * self.rank];
        self.a.nt(x, self.rank, &mut OutMat::of(&mut u, x.rows, self.rank));
        for (i, u) in u.chunks_exact_mut(self.rank.max(1)).enumerate() {
            let scale = weight(i) * self.scale;
            u.iter_mut().for_each(|u| *u *= scale);
        }
        self.b.add_nn(&mut u, self.rank, self.outputs, y);
    }

    /// Whether it maps rows of so many numbers to rows of so many.
    pub fn maps(&self, inputs: usize, outputs: usize) -> bool {
        self.inputs == inputs && self.outputs == outputs
    }
}

/// Makes each change on its own rows of `y`: `x` is `(m, in)`, `y` is `(m, out)`; ranges of rows do not overlap.
/// Nobody else may hold `y`: on the CPU it is changed in place. No gradients.
pub fn add_low_rank(x: &Tensor, y: Tensor, changes: &[(Range<usize>, &LowRank)]) -> Result<Tensor> {
    let ((m, inputs), (rows, outputs)) = (x.dims2()?, y.dims2()?);
    if m != rows || !changes.iter().all(|(_, change)| change.maps(inputs, outputs)) {
        candle_core::bail!("low-rank changes of x ({m}, {inputs}), y ({rows}, {outputs})");
    }
    if ops::is_composed(x) {
        return changes.iter().try_fold(y, |y, (rows, change)| {
            let part = |x: &Tensor| x.narrow(0, rows.start, rows.len());
            y.slice_assign(&[rows.clone(), 0..change.outputs], &change.composed(&part(x)?, part(&y)?)?)
        });
    }
    if x.track_op() {
        candle_core::bail!("a served adapter gives no gradients");
    }
    ops::with([&x.contiguous()?], |[x]| {
        edit(&y, ROWS, changes, |change, rows, y| {
            change.apply(Mat::new(&x[rows.start * inputs..], rows.len(), inputs), y);
        })
    })?;
    Ok(y)
}
