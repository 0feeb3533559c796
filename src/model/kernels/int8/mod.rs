//! Products of rows rounded to int8 with weights as they are stored: what serving computes with.
//!
//! A row `x` becomes int8 codes `q`, one scale `d` for each block of 32 (16 for Q6_K) along `k`: `x ≈ d·q`. A stored
//! weight is `w = s·c + m` with an unsigned code `c` of 4 to 8 bits and, for each block, a scale and a minimum. So a
//! block adds `s·d·Σ c·q + m·d·Σ q`: an exact integer sum, and two f32 products. Blocks are added in their order,
//! whatever else is computed beside them: a row's result is the same bits in any batch.
//!
//! NF4 has 16 uneven levels in place of even codes: each is rounded to an int8 of its own (`panel::LEVELS`), which moves
//! a weight by at most 0.4 % of its block's largest, less than the rounding of the rows does.

mod amx;
mod avx2;
mod avx512;
mod panel;
mod portable;

pub use panel::Panel;

use rayon::prelude::*;

use super::{Isa, Mat, OutMat, elementwise::by_isa};
use crate::formats::Storage;

/// How many numbers of a row share a scale beside weights of this storage; none where weights have no codes.
pub fn block_len(storage: Storage) -> Option<usize> {
    match storage {
        Storage::F32 | Storage::F16 | Storage::BF16 => None,
        Storage::Q6K => Some(16),
        Storage::Q4_0 | Storage::Q4_1 | Storage::Q5_0 | Storage::Q5_1 | Storage::Q8_0 => Some(32),
        Storage::Q4K | Storage::Q5K | Storage::NF4 | Storage::NF4DQ => Some(32),
    }
}

/// Rows rounded to int8.
pub struct Rows {
    rows: usize,
    cols: usize,
    block: usize,
    /// `(rows, cols)`
    codes: Vec<i8>,
    /// `(rows, blocks)`: the scale of a block.
    scales: Vec<f32>,
    /// `(rows, blocks)`: its scale times the sum of its codes.
    sums: Vec<f32>,
}

impl Rows {
    /// # Panics
    /// If the rows are not whole blocks.
    pub fn round(x: Mat, block: usize) -> Self {
        assert!(x.cols.is_multiple_of(block) && (block == 16 || block == 32), "rows are not whole blocks");
        let blocks = x.cols / block;
        let (mut codes, mut scales) = (vec![0i8; x.rows * x.cols], vec![0f32; x.rows * blocks]);
        let mut sums = scales.clone();
        // Few, so that the rows of a small batch are not all one thread's.
        const ROWS: usize = 4;
        let parts = codes.par_chunks_mut(ROWS * x.cols).zip(scales.par_chunks_mut(ROWS * blocks));
        parts.zip(sums.par_chunks_mut(ROWS * blocks)).enumerate().for_each(|(t, ((codes, scales), sums))| {
            let parts = codes.chunks_mut(x.cols).zip(scales.chunks_mut(blocks)).zip(sums.chunks_mut(blocks));
            for (i, ((codes, scales), sums)) in parts.enumerate() {
                round_row(&x.data[(ROWS * t + i) * x.stride..][..x.cols], block, codes, scales, sums);
            }
        });
        Self { rows: x.rows, cols: x.cols, block, codes, scales, sums }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    fn blocks(&self) -> usize {
        self.cols / self.block
    }

    /// Codes, scales and sums of the row `i`.
    #[inline(always)]
    fn row(&self, i: usize) -> (&[i8], &[f32], &[f32]) {
        let blocks = i * self.blocks()..(i + 1) * self.blocks();
        (&self.codes[i * self.cols..][..self.cols], &self.scales[blocks.clone()], &self.sums[blocks])
    }
}

by_isa! {
    /// A block that holds a NaN or an infinity gets a scale that is no number, so that the product says so.
    pub fn round_row(x: &[f32], block: usize, codes: &mut [i8], scales: &mut [f32], sums: &mut [f32]) {
        match block {
            16 => round_blocks::<16>(x, codes, scales, sums),
            _ => round_blocks::<32>(x, codes, scales, sums),
        }
    }
}

by_isa! {
    /// A row of finite numbers with one scale, which it returns: `x ≈ scale · codes`.
    pub fn round_whole(x: &[f32], codes: &mut [i8]) -> f32 {
        let mut most = [0f32; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for x in chunks {
            for (most, x) in most.iter_mut().zip(x) {
                *most = if x.abs() > *most { x.abs() } else { *most };
            }
        }
        let most = most.iter().chain(rest).fold(0f32, |most, x| if x.abs() > most { x.abs() } else { most });
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        for (code, x) in codes.iter_mut().zip(x) {
            *code = nearest(x * inverse);
        }
        most / 127.0
    }
}

/// The nearest whole number (ties to even) of one within ±127, and what is beyond is brought there.
#[inline(always)]
fn nearest(x: f32) -> i8 {
    // Added to a number of at most 2²², it leaves the nearest whole one in the lowest bits.
    const WHOLE: f32 = 12_582_912.0;
    (x.clamp(-127.0, 127.0) + WHOLE).to_bits() as i8
}

/// Blocks of a length that the compiler knows.
#[inline(always)]
fn round_blocks<const N: usize>(x: &[f32], codes: &mut [i8], scales: &mut [f32], sums: &mut [f32]) {
    let blocks = x.as_chunks::<N>().0.iter().zip(codes.as_chunks_mut::<N>().0);
    for ((x, codes), (scale, sum)) in blocks.zip(scales.iter_mut().zip(sums)) {
        let (mut most, mut poison) = ([0f32; 16], [0f32; 16]);
        for x in x.as_chunks::<16>().0 {
            for ((most, poison), x) in most.iter_mut().zip(&mut poison).zip(x) {
                let size = x.abs();
                *most = if size > *most { size } else { *most };
                *poison += x * 0.0;
            }
        }
        let most = most.into_iter().fold(0f32, |most, x| if x > most { x } else { most });
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        let mut total = 0i32;
        for (code, x) in codes.iter_mut().zip(x) {
            *code = nearest(x * inverse);
            total += i32::from(*code);
        }
        *scale = most / 127.0 + poison.into_iter().sum::<f32>();
        *sum = *scale * total as f32;
    }
}

/// `out = x · panelᵀ`: `x` is `(m, k)`, the panel holds up to 16 rows of weights, `out` is `(m, panel rows)`.
pub fn nt(x: &Rows, panel: &Panel, out: &mut OutMat) {
    nt_with(Isa::chosen(), x, panel, out);
}

fn nt_with(isa: Isa, x: &Rows, panel: &Panel, out: &mut OutMat) {
    assert!(
        x.cols == panel.cols() && x.block == panel.block() && x.rows == out.rows && panel.rows() == out.cols,
        "shapes differ"
    );
    match isa {
        Isa::Portable => portable::nt(x, panel, out),
        // SAFETY: `available` found the instructions; the shapes are checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => unsafe { amx::nt(x, panel, out) },
        // SAFETY: as above, here also VNNI.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if is_x86_feature_detected!("avx512vnni") => unsafe { avx512::nt(x, panel, out, 0) },
        // SAFETY: as above; who has AVX-512 has AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { avx2::nt(x, panel, out) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => portable::nt(x, panel, out),
    }
}

/// Whether the kernels multiply as the portable ones do: in codes, scales and sums that are small whole numbers, where
/// every order of the sum gives the same.
pub(super) fn is_sound(isa: Isa) -> bool {
    // More rows than a tile has, more blocks than are summed at a time, and a few of each behind.
    const ROWS: usize = 19;
    let mut numbers = super::check::whole_numbers(127);
    [Storage::Q8_0, Storage::Q6K].into_iter().all(|storage| {
        let (block, size) = (block_len(storage).unwrap_or(32), storage.block_bytes());
        let cols = if storage == Storage::Q8_0 { 7 * 32 } else { 256 };
        let codes: Vec<i8> = numbers.by_ref().take(ROWS * cols).collect();
        let sum = |block: &[i8]| block.iter().map(|code| f32::from(*code)).sum();
        let sums: Vec<f32> = codes.chunks(block).map(sum).collect();
        let x = Rows { rows: ROWS, cols, block, scales: vec![1.0; sums.len()], codes, sums };
        let stored = Panel::ROWS * cols / storage.block_len() * size;
        let mut bytes: Vec<u8> = numbers.by_ref().take(stored).map(|x| x as u8).collect();
        for bytes in bytes.chunks_mut(size) {
            // Scales of one: of the whole block, and in Q6_K of each sixteen codes.
            match storage {
                Storage::Q8_0 => bytes[..2].copy_from_slice(&[0, 0x3C]),
                _ => {
                    bytes[192..208].fill(1);
                    bytes[208..].copy_from_slice(&[0, 0x3C]);
                }
            }
        }
        let product = |isa| {
            let (mut panel, mut out) = (Panel::default(), vec![f32::NAN; ROWS * Panel::ROWS]);
            panel.fill_with(isa, storage, &bytes, Panel::ROWS, cols);
            nt_with(isa, &x, &panel, &mut OutMat::of(&mut out, ROWS, Panel::ROWS));
            out
        };
        product(isa) == product(Isa::Portable)
    })
}

#[cfg(test)]
mod tests;
