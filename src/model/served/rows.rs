//! Rows of a batch that belong to different adapters, changed in place.

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};
use rayon::prelude::*;

use crate::model::{
    kernels::{Out, OutMat},
    ops,
};

/// Rows that one task takes.
pub const ROWS: usize = 32;

/// Runs `f` on rows of `y: (m, n)`, which nobody else may hold: for each range, which do not overlap, in parts of at
/// most `most` rows, with the range's own thing, the part's first row and its rows. No gradients.
pub fn edit<T: Sync + ?Sized>(
    y: &Tensor,
    most: usize,
    owners: &[(Range<usize>, &T)],
    f: impl Fn(&T, Range<usize>, &mut OutMat) + Sync,
) -> Result<()> {
    if y.track_op() {
        candle_core::bail!("a served adapter gives no gradients");
    }
    y.inplace_op1(&Edit { most, owners, f })
}

struct Edit<'a, T: ?Sized, F> {
    most: usize,
    owners: &'a [(Range<usize>, &'a T)],
    f: F,
}

impl<T: Sync + ?Sized, F: Fn(&T, Range<usize>, &mut OutMat) + Sync> InplaceOp1 for Edit<'_, T, F> {
    fn name(&self) -> &'static str {
        "edit-rows"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (m, n) = layout.shape().dims2()?;
        let (CpuStorage::F32(y), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("adapters change contiguous f32 rows")
        };
        let mut free = 0;
        for (rows, _) in self.owners {
            if rows.start < free || rows.end > m {
                candle_core::bail!("rows {rows:?} of {m} overlap or are not there");
            }
            free = rows.end;
        }
        let out = Out::new(&mut y[start..end], n);
        let tasks: Vec<(Range<usize>, &T)> = (self.owners.iter())
            .flat_map(|(rows, owner)| {
                rows.clone().step_by(self.most).map(move |at| (at..rows.end.min(at + self.most), *owner))
            })
            .collect();
        tasks.into_par_iter().for_each(|(rows, owner)| {
            // SAFETY: tasks have different rows, since ranges do not overlap, and `y` is borrowed until all have ended.
            let mut part = unsafe { out.part(rows.start * n, rows.len(), n) };
            (self.f)(owner, rows, &mut part);
        });
        Ok(())
    }
}

/// Multiplies ranges of rows of `z: (m, n)` with factors `(n)`. Nobody else may hold `z`: on the CPU it is changed in
/// place. No gradients.
pub fn scale_rows(z: Tensor, factors: &[(Range<usize>, &[f32])]) -> Result<Tensor> {
    let n = z.dim(1)?;
    if let Some((rows, factors)) = factors.iter().find(|(_, factors)| factors.len() != n) {
        candle_core::bail!("{} factors for rows {rows:?} of {n} numbers", factors.len());
    }
    if ops::is_composed(&z) {
        return factors.iter().try_fold(z, |z, (rows, factors)| {
            let row = Tensor::from_slice(factors, (1, factors.len()), z.device())?;
            let scaled = z.narrow(0, rows.start, rows.len())?.broadcast_mul(&row)?;
            z.slice_assign(&[rows.clone(), 0..factors.len()], &scaled)
        });
    }
    edit(&z, ROWS, factors, |factors, rows, part| {
        for i in 0..rows.len() {
            part.row(i).iter_mut().zip(factors).for_each(|(z, factor)| *z *= factor);
        }
    })?;
    Ok(z)
}
