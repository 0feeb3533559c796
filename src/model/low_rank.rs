//! Low-rank changes and factors of frozen linears while they are served, for any number of adapters at once.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use candle_core::{CpuStorage, Device, InplaceOp1, InplaceOp2, Layout, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::{
    At, Hook, Linear,
    kernels::{
        self, Mat, Out, OutMat,
        bf16::{narrow, nn_wide, nt_wide, widen},
    },
    ops,
    weight::Compute,
};
use crate::domain::Site;

/// Rows that one task takes.
const ROWS: usize = 32;

/// A trained factor; serving pays for its bytes, not for its products.
enum Factor {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Factor {
    fn new(values: Vec<f32>, compute: Compute) -> Self {
        match compute {
            Compute::F32 | Compute::Bf16 => Self::F32(values),
            Compute::Int8 => {
                let mut narrowed = vec![bf16::ZERO; values.len()];
                narrow(&values, &mut narrowed);
                Self::Bf16(narrowed)
            }
        }
    }

    /// `out = x · selfᵀ`: `(m, cols) → (m, rows)`.
    fn nt(&self, x: Mat, rows: usize, out: &mut OutMat) {
        match self {
            Self::F32(values) => kernels::nt(x, Mat::new(values, rows, x.cols), out, false),
            Self::Bf16(values) => nt_wide(x, Mat::new(values, rows, x.cols), out, false),
        }
    }

    /// `out += x · self`: `(m, rows) → (m, cols)`.
    fn add_nn(&self, x: Mat, cols: usize, out: &mut OutMat) {
        match self {
            Self::F32(values) => kernels::nn(x, Mat::new(values, x.cols, cols), out, true),
            Self::Bf16(values) => nn_wide(x, Mat::new(values, x.cols, cols), out, true),
        }
    }

    fn tensor(&self, rows: usize, cols: usize, device: &Device) -> Result<Tensor> {
        match self {
            Self::F32(values) => Tensor::from_slice(values, (rows, cols), device),
            Self::Bf16(values) => {
                let mut wide = vec![0.0; values.len()];
                widen(values, &mut wide);
                Tensor::from_vec(wide, (rows, cols), device)
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val(values.as_slice()),
            Self::Bf16(values) => size_of_val(values.as_slice()),
        }
    }
}

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

/// `g ⊙ (y + s · (x Aᵀ) Bᵀ)` with `A: (r, in)`, `B: (out, r)`; r may be 0, and g be missing.
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
    factors: Option<Factors>,
}

impl LowRank {
    /// # Panics
    /// If the factors are not of one rank; loaders check before.
    pub(super) fn new(a: Vec<f32>, b: &[f32], (outputs, inputs): (usize, usize), scale: f64, compute: Compute) -> Self {
        let rank = a.len() / inputs;
        assert!(a.len() == rank * inputs && b.len() == rank * outputs, "factors do not fit");
        let b = kernels::transpose(Mat::new(b, outputs, rank));
        let (a, b) = (Factor::new(a, compute), Factor::new(b, compute));
        Self { rank, inputs, outputs, scale: scale as f32, a, b, placed: OnceLock::new(), factors: None }
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

    fn bytes(&self) -> usize {
        let factors = self.factors.as_ref().map_or(0, |factors| size_of_val(factors.g.as_slice()));
        self.a.bytes() + self.b.bytes() + factors
    }

    /// The same on any device, of candle's own operations.
    fn composed(&self, x: &Tensor, y: Tensor) -> Result<Tensor> {
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

    /// A row's result does not depend on the other rows.
    fn apply(&self, x: Mat, y: &mut OutMat) {
        if self.rank > 0 {
            self.add(x, y);
        }
        if let Some(factors) = &self.factors {
            (0..x.rows).for_each(|i| factors.apply(y.row(i)));
        }
    }

    fn add(&self, x: Mat, y: &mut OutMat) {
        let mut u = vec![0.0; x.rows * self.rank];
        self.a.nt(x, self.rank, &mut OutMat::of(&mut u, x.rows, self.rank));
        u.iter_mut().for_each(|u| *u *= self.scale);
        self.b.add_nn(Mat::new(&u, x.rows, self.rank), self.outputs, y);
    }
}

/// An adapter that does nothing but change linears of the layers in this way.
#[derive(Default)]
pub struct LowRanks {
    /// `[layer][site]`
    layers: Vec<[Option<LowRank>; Site::LAYER.len()]>,
    /// Of each layer: factors of the feed-forward product before `down` (IA3).
    products: Vec<Option<Vec<f32>>>,
}

impl LowRanks {
    pub fn new(layers: usize) -> Self {
        Self { layers: (0..layers).map(|_| Default::default()).collect(), products: vec![None; layers] }
    }

    pub fn insert(&mut self, layer: usize, site: Site, change: LowRank) {
        if let Some(slot) = self.layers.get_mut(layer).and_then(|sites| sites.get_mut(site as usize)) {
            *slot = Some(change);
        }
    }

    pub fn get(&self, layer: usize, site: Site) -> Option<&LowRank> {
        self.layers.get(layer)?.get(site as usize)?.as_ref()
    }

    pub fn insert_product(&mut self, layer: usize, factors: Vec<f32>) {
        if let Some(slot) = self.products.get_mut(layer) {
            *slot = Some(factors);
        }
    }

    pub fn product(&self, layer: usize) -> Option<&[f32]> {
        self.products.get(layer)?.as_deref()
    }

    /// Memory that the factors take up.
    pub fn bytes(&self) -> usize {
        let products = self.products.iter().flatten().map(|factors| size_of_val(factors.as_slice()));
        self.layers.iter().flatten().flatten().map(LowRank::bytes).chain(products).sum()
    }
}

impl Hook for LowRanks {
    fn low_rank(&self) -> Option<&LowRanks> {
        Some(self)
    }

    /// For hooks around this one, which have to be called themselves.
    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, _: &Linear) -> Result<Tensor> {
        let Some(change) = self.get(at.layer, site) else { return Ok(y) };
        add_low_rank(x, y.copy()?, &[(0..x.dim(0)?, change)])
    }

    fn act(&self, at: At, z: Tensor) -> Result<Tensor> {
        let Some(factors) = self.product(at.layer) else { return Ok(z) };
        scale_rows(z.copy()?, &[(0..z.dim(0)?, factors)])
    }
}

/// Makes each change on its own rows of `y`: `x` is `(m, in)`, `y` is `(m, out)`; ranges of rows do not overlap.
/// Nobody else may hold `y`: on the CPU it is changed in place. No gradients.
pub fn add_low_rank(x: &Tensor, y: Tensor, changes: &[(Range<usize>, &LowRank)]) -> Result<Tensor> {
    if x.track_op() {
        candle_core::bail!("a served adapter gives no gradients");
    }
    if ops::is_composed(x) {
        return changes.iter().try_fold(y, |y, (rows, change)| {
            let part = |x: &Tensor| x.narrow(0, rows.start, rows.len());
            y.slice_assign(&[rows.clone(), 0..change.outputs], &change.composed(&part(x)?, part(&y)?)?)
        });
    }
    y.inplace_op2(&x.contiguous()?, &Add(changes))?;
    Ok(y)
}

struct Add<'a>(&'a [(Range<usize>, &'a LowRank)]);

impl InplaceOp2 for Add<'_> {
    fn name(&self) -> &'static str {
        "add-low-rank"
    }

    fn cpu_fwd(&self, sy: &mut CpuStorage, ly: &Layout, sx: &CpuStorage, lx: &Layout) -> Result<()> {
        let ((m, inputs), (rows, outputs)) = (lx.shape().dims2()?, ly.shape().dims2()?);
        let x = ops::slice(sx, lx)?;
        let (CpuStorage::F32(y), Some((start, end))) = (sy, ly.contiguous_offsets()) else {
            candle_core::bail!("low-rank changes need contiguous f32 rows")
        };
        let fits = |change: &LowRank| change.inputs == inputs && change.outputs == outputs;
        let mut free = 0;
        for (range, change) in self.0 {
            if m != rows || range.start < free || range.end > m || !fits(change) {
                candle_core::bail!("low-rank change of rows {range:?} of x ({m}, {inputs}), y ({rows}, {outputs})");
            }
            free = range.end;
        }
        let out = Out::new(&mut y[start..end], outputs);
        let tasks: Vec<(usize, usize, &LowRank)> = (self.0.iter())
            .flat_map(|(r, change)| r.clone().step_by(ROWS).map(|at| (at, ROWS.min(r.end - at), *change)))
            .collect();
        tasks.into_par_iter().for_each(|(at, count, change)| {
            // SAFETY: tasks write different rows, since ranges do not overlap, and `y` is borrowed until all have ended.
            let mut part = unsafe { out.part(at * outputs, count, outputs) };
            change.apply(Mat::new(&x[at * inputs..], count, inputs), &mut part);
        });
        Ok(())
    }
}

/// Multiplies ranges of rows of `z: (m, n)` with factors `(n)`. Nobody else may hold `z`: on the CPU it is changed in
/// place. No gradients.
pub fn scale_rows(z: Tensor, factors: &[(Range<usize>, &[f32])]) -> Result<Tensor> {
    if z.track_op() {
        candle_core::bail!("a served adapter gives no gradients");
    }
    if ops::is_composed(&z) {
        return factors.iter().try_fold(z, |z, (rows, factors)| {
            let row = Tensor::from_slice(factors, (1, factors.len()), z.device())?;
            let scaled = z.narrow(0, rows.start, rows.len())?.broadcast_mul(&row)?;
            z.slice_assign(&[rows.clone(), 0..factors.len()], &scaled)
        });
    }
    z.inplace_op1(&Scale(factors))?;
    Ok(z)
}

struct Scale<'a>(&'a [(Range<usize>, &'a [f32])]);

impl InplaceOp1 for Scale<'_> {
    fn name(&self) -> &'static str {
        "scale-rows"
    }

    fn cpu_fwd(&self, sz: &mut CpuStorage, lz: &Layout) -> Result<()> {
        let (m, n) = lz.shape().dims2()?;
        let (CpuStorage::F32(z), Some((start, end))) = (sz, lz.contiguous_offsets()) else {
            candle_core::bail!("scaled rows need contiguous f32 rows")
        };
        let rows = &mut z[start..end];
        for (range, factors) in self.0 {
            if range.end > m || factors.len() != n {
                candle_core::bail!("{} factors for rows {range:?} of ({m}, {n})", factors.len());
            }
            for row in rows[range.start * n..range.end * n].chunks_mut(n) {
                row.iter_mut().zip(*factors).for_each(|(z, factor)| *z *= factor);
            }
        }
        Ok(())
    }
}
