//! Low-rank changes of frozen linears while they are served, for any number of adapters at once.

use std::{cell::RefCell, ops::Range, sync::OnceLock};

use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::{
    At, Hook, Linear,
    kernels::{
        self, Mat, Out, OutMat,
        bf16::{narrow, widen},
    },
    ops,
    weight::Compute,
};
use crate::domain::Site;

/// Rows that one task takes.
const ROWS: usize = 32;

thread_local! {
    static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

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

    /// Runs `f` on the numbers, `cols` a row.
    fn with<R>(&self, rows: usize, cols: usize, f: impl FnOnce(Mat) -> R) -> R {
        match self {
            Self::F32(values) => f(Mat::new(values, rows, cols)),
            Self::Bf16(values) => WIDE.with_borrow_mut(|wide| {
                wide.resize(values.len().max(wide.len()), 0.0);
                widen(values, &mut wide[..values.len()]);
                f(Mat::new(wide, rows, cols))
            }),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val(values.as_slice()),
            Self::Bf16(values) => size_of_val(values.as_slice()),
        }
    }
}

/// `y + s · (x Aᵀ) Bᵀ` with `A: (r, in)`, `B: (out, r)`.
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
}

impl LowRank {
    /// # Panics
    /// If the factors are not of one rank; loaders check before.
    pub(super) fn new(a: Vec<f32>, b: &[f32], (outputs, inputs): (usize, usize), scale: f64, compute: Compute) -> Self {
        let rank = a.len() / inputs;
        assert!(a.len() == rank * inputs && b.len() == rank * outputs, "factors do not fit");
        let b = kernels::transpose(Mat::new(b, outputs, rank));
        let (a, b) = (Factor::new(a, compute), Factor::new(b, compute));
        Self { rank, inputs, outputs, scale: scale as f32, a, b, placed: OnceLock::new() }
    }

    /// `A: (r, in)` and `B: (out, r)` on a device.
    fn on(&self, device: &Device) -> Result<[Tensor; 2]> {
        if let Some(placed) = self.placed.get() {
            return Ok(placed.clone());
        }
        let tensor = |factor: &Factor, cols: usize| {
            factor.with(self.rank, cols, |x| Tensor::from_slice(&x.data[..self.rank * cols], (self.rank, cols), device))
        };
        let placed = [tensor(&self.a, self.inputs)?, tensor(&self.b, self.outputs)?.t()?.contiguous()?];
        Ok(self.placed.get_or_init(|| placed).clone())
    }

    /// A row's result does not depend on the other rows.
    fn add(&self, x: Mat, y: &mut OutMat) {
        let mut u = vec![0.0; x.rows * self.rank];
        self.a.with(self.rank, self.inputs, |a| {
            kernels::nt(x, a, &mut OutMat::of(&mut u, x.rows, self.rank), false);
        });
        u.iter_mut().for_each(|u| *u *= self.scale);
        self.b.with(self.rank, self.outputs, |b| kernels::nn(Mat::new(&u, x.rows, self.rank), b, y, true));
    }
}

/// An adapter that does nothing but change linears of the layers in this way.
#[derive(Default)]
pub struct LowRanks {
    /// `[layer][site]`
    layers: Vec<[Option<LowRank>; Site::LAYER.len()]>,
}

impl LowRanks {
    pub fn new(layers: usize) -> Self {
        Self { layers: (0..layers).map(|_| Default::default()).collect() }
    }

    pub fn insert(&mut self, layer: usize, site: Site, change: LowRank) {
        if let Some(slot) = self.layers.get_mut(layer).and_then(|sites| sites.get_mut(site as usize)) {
            *slot = Some(change);
        }
    }

    pub fn get(&self, layer: usize, site: Site) -> Option<&LowRank> {
        self.layers.get(layer)?.get(site as usize)?.as_ref()
    }

    /// Memory that the factors take up.
    pub fn bytes(&self) -> usize {
        self.layers.iter().flatten().flatten().map(|change| change.a.bytes() + change.b.bytes()).sum()
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
}

/// Adds each change to its own rows of `y`: `x` is `(m, in)`, `y` is `(m, out)`; ranges of rows do not overlap.
/// Nobody else may hold `y`: on the CPU it is changed in place. No gradients.
pub fn add_low_rank(x: &Tensor, y: Tensor, changes: &[(Range<usize>, &LowRank)]) -> Result<Tensor> {
    if x.track_op() {
        candle_core::bail!("a served adapter gives no gradients");
    }
    if ops::is_composed(x) {
        return changes.iter().try_fold(y, |y, (rows, change)| {
            let [a, b] = change.on(x.device())?;
            let change = ops::composed::low_rank_delta(&x.narrow(0, rows.start, rows.len())?, &a, &b, change.scale)?;
            y.slice_assign(&[rows.clone(), 0..b.dim(0)?], &(y.narrow(0, rows.start, rows.len())? + change)?)
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
            change.add(Mat::new(&x[at * inputs..], count, inputs), &mut part);
        });
        Ok(())
    }
}
