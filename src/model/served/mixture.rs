//! A mixture of feed-forward blocks that differ by low-rank changes, row by row: with w a row's weights of the experts,
//! z the frozen block's activation and `z_e` that of its gate and up with the expert's changes, `down` takes
//! `z + Σ w_e (z_e − z)`, and `Σ w_e · s · B_e A_e z_e` is added to its product.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::{
    LowRank,
    rows::{ROWS, edit},
};
use crate::model::{
    kernels::{
        self, Mat, Out, OutMat,
        elementwise::{self, softmax},
    },
    mlp::Products,
    ops::{self, Activation},
};

/// Of the experts' probabilities, what each expert counts: 0 where it is not at work.
pub type Choose = Box<dyn Fn(&[f32]) -> Vec<f32> + Send + Sync>;

pub struct Mixture {
    /// `(experts, hidden)`
    pub router: Vec<f32>,
    pub choose: Choose,
    /// The changes of each expert: all or none.
    pub gate: Vec<LowRank>,
    pub up: Vec<LowRank>,
    pub down: Vec<LowRank>,
}

impl Mixture {
    pub fn bytes(&self) -> usize {
        let experts = self.gate.iter().chain(&self.up).chain(&self.down);
        size_of_val(self.router.as_slice()) + experts.map(LowRank::bytes).sum::<usize>()
    }

    /// The experts at work for a row of the block's input, with what they count.
    fn chosen(&self, h: &[f32]) -> Vec<(usize, f32)> {
        let experts = self.router.len() / h.len();
        let mut p = vec![0.0; experts];
        let router = Mat::new(self.router.as_slice(), experts, h.len());
        kernels::nt(Mat::new(h, 1, h.len()), router, &mut OutMat::of(&mut p, 1, experts), false);
        softmax(&mut p);
        (self.choose)(&p).into_iter().enumerate().filter(|(_, weight)| *weight != 0.0).collect()
    }
}

/// One row of the frozen products.
struct Row<'a> {
    h: &'a [f32],
    gate: &'a [f32],
    up: &'a [f32],
}

impl Row<'_> {
    /// `z` becomes what `down` takes, `extra` what is added to its product.
    fn mix(&self, mixture: &Mixture, activation: Activation, z: &mut [f32], extra: &mut [f32]) {
        let frozen = z.to_vec();
        let mut own = vec![0.0; z.len()];
        for (expert, weight) in mixture.chosen(self.h) {
            let changed = |y: &[f32], changes: &[LowRank]| {
                let mut y = y.to_vec();
                if let Some(change) = changes.get(expert) {
                    let n = y.len();
                    change.add(Mat::new(self.h, 1, self.h.len()), |_| 1.0, &mut OutMat::of(&mut y, 1, n));
                }
                y
            };
            let (gate, up) = (changed(self.gate, &mixture.gate), changed(self.up, &mixture.up));
            match activation {
                Activation::Silu => elementwise::swiglu(&gate, &up, &mut own),
                Activation::Gelu => elementwise::geglu(&gate, &up, &mut own),
            }
            z.iter_mut().zip(own.iter().zip(&frozen)).for_each(|(z, (own, frozen))| *z += weight * (own - frozen));
            if let Some(change) = mixture.down.get(expert) {
                let n = extra.len();
                change.add(Mat::new(&own, 1, own.len()), |_| weight, &mut OutMat::of(extra, 1, n));
            }
        }
    }
}

/// What `down`'s product lacks, `(rows, hidden)`.
pub struct Extra(Vec<f32>);

/// Mixes each range of rows in place of the frozen block's: `frozen.z`, which nobody else may hold, becomes what `down`
/// takes. `h` is the block's normed input. No gradients.
pub fn mix(
    h: &Tensor,
    frozen: &Products,
    activation: Activation,
    mixtures: &[(Range<usize>, &Mixture)],
) -> Result<Extra> {
    let ((m, hidden), (rows, width)) = (h.dims2()?, frozen.z.dims2()?);
    let fit = |mixture: &Mixture| {
        mixture.gate.iter().chain(&mixture.up).all(|change| change.maps(hidden, width))
            && mixture.down.iter().all(|change| change.maps(width, hidden))
            && mixture.router.len().is_multiple_of(hidden)
    };
    if m != rows || !mixtures.iter().all(|(_, mixture)| fit(mixture)) {
        candle_core::bail!("mixtures of h ({m}, {hidden}), z ({rows}, {width})");
    }
    let mut extra = vec![0.0; m * hidden];
    let out = Out::new(&mut extra, hidden);
    ops::with([&h.contiguous()?, &frozen.gate.contiguous()?, &frozen.up.contiguous()?], |[h, gate, up]| {
        edit(&frozen.z, 1, mixtures, |mixture, rows, z| {
            let i = rows.start;
            let row =
                Row { h: &h[i * hidden..][..hidden], gate: &gate[i * width..][..width], up: &up[i * width..][..width] };
            // SAFETY: each call has a row of its own, and `extra` is borrowed until all have ended.
            let mut extra = unsafe { out.part(i * hidden, 1, hidden) };
            row.mix(mixture, activation, z.row(0), extra.row(0));
        })
    })?;
    Ok(Extra(extra))
}

/// `down`'s product, which nobody else may hold, with what it lacks.
pub fn complete(y: Tensor, extra: &Extra, mixtures: &[(Range<usize>, &Mixture)]) -> Result<Tensor> {
    let hidden = y.dim(1)?;
    edit(&y, ROWS, mixtures, |_, rows, y| {
        for (i, extra) in rows.clone().zip(0..).map(|(row, i)| (i, &extra.0[row * hidden..][..hidden])) {
            y.row(i).iter_mut().zip(extra).for_each(|(y, extra)| *y += extra);
        }
    })?;
    Ok(y)
}
