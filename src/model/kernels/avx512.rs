//! The products with AVX-512.
//!
//! `nt` keeps one accumulator of 16 lanes for each output element, in tiles of 6 × 4 (24 of the 32 registers), so the
//! order of a sum does not depend on the tile. `nn` keeps tiles of 12 rows × 32 columns, each lane summing in the
//! order of `k`. Ends that fill no register are masked.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::{Mat, OutMat, Wide};

/// # Safety
/// The machine has the instructions of `Isa::Avx512`; `a`, `b` and `out` have matching shapes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn nt<T: Wide>(a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    let mut i = 0;
    // SAFETY: every tile lies inside the matrices: `i + M <= a.rows`.
    unsafe {
        while i + 6 <= a.rows {
            nt_rows::<T, 6, 4>(a, b, out, i, accumulate);
            i += 6;
        }
        while i + 3 <= a.rows {
            nt_rows::<T, 3, 8>(a, b, out, i, accumulate);
            i += 3;
        }
        while i < a.rows {
            nt_rows::<T, 1, 8>(a, b, out, i, accumulate);
            i += 1;
        }
    }
}

/// # Safety
/// As [`nt`]; rows `i..i+M` exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn nt_rows<T: Wide, const M: usize, const N: usize>(a: Mat, b: Mat<T>, out: &mut OutMat, i: usize, add: bool) {
    let mut j = 0;
    // SAFETY: `j + N <= b.rows`.
    unsafe {
        while j + N <= b.rows {
            nt_tile::<T, M, N>(a, b, out, i, j, add);
            j += N;
        }
        while j < b.rows {
            nt_tile::<T, M, 1>(a, b, out, i, j, add);
            j += 1;
        }
    }
}

/// # Safety
/// As [`nt`]; rows `i..i+M` and `j..j+N` exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn nt_tile<T: Wide, const M: usize, const N: usize>(
    a: Mat,
    b: Mat<T>,
    out: &mut OutMat,
    i: usize,
    j: usize,
    add: bool,
) {
    let k = a.cols;
    // SAFETY: `p + 16 <= k` or the mask keep every load inside a row, and rows are inside their slices.
    unsafe {
        let x: [*const f32; M] = std::array::from_fn(|m| a.data.as_ptr().add((i + m) * a.stride));
        let y: [*const T; N] = std::array::from_fn(|n| b.data.as_ptr().add((j + n) * b.stride));
        let mut sums = [[_mm512_setzero_ps(); N]; M];
        let mut p = 0;
        while p + 16 <= k {
            let mut ys = [_mm512_setzero_ps(); N];
            for (ys, y) in ys.iter_mut().zip(&y) {
                *ys = T::load16(y.add(p));
            }
            for (sums, x) in sums.iter_mut().zip(&x) {
                let xs = _mm512_loadu_ps(x.add(p));
                for (sum, y) in sums.iter_mut().zip(&ys) {
                    *sum = _mm512_fmadd_ps(xs, *y, *sum);
                }
            }
            p += 16;
        }
        if p < k {
            let mask = low(k - p);
            let mut ys = [_mm512_setzero_ps(); N];
            for (ys, y) in ys.iter_mut().zip(&y) {
                *ys = T::load16_some(mask, y.add(p));
            }
            for (sums, x) in sums.iter_mut().zip(&x) {
                let xs = _mm512_maskz_loadu_ps(mask, x.add(p));
                for (sum, y) in sums.iter_mut().zip(&ys) {
                    *sum = _mm512_fmadd_ps(xs, *y, *sum);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            put_row(sums, out.data.add((i + m) * out.stride + j), add);
        }
    }
}

/// Sums the lanes of neighbouring outputs and writes them, four at a time.
///
/// # Safety
/// `N` places from `place` are the caller's to write.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn put_row<const N: usize>(sums: &[__m512; N], place: *mut f32, add: bool) {
    for (n, four) in sums.chunks(4).enumerate() {
        let lane = |i: usize| four.get(i).copied().unwrap_or(_mm512_setzero_ps());
        let total = sum_lanes([lane(0), lane(1), lane(2), lane(3)]);
        let mask = (1u8 << four.len()) - 1;
        // SAFETY: the mask has the lanes that exist; by the caller.
        unsafe {
            let place = place.add(4 * n);
            if mask == 15 {
                let total = if add { _mm_add_ps(_mm_loadu_ps(place), total) } else { total };
                _mm_storeu_ps(place, total);
            } else {
                let mut lanes = [0f32; 4];
                _mm_storeu_ps(lanes.as_mut_ptr(), total);
                for (i, sum) in lanes.iter().enumerate().take(four.len()) {
                    let place = &mut *place.add(i);
                    *place = if add { *place + sum } else { *sum };
                }
            }
        }
    }
}

/// The sum of each register's lanes; one order for all four.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_lanes([a, b, c, d]: [__m512; 4]) -> __m128 {
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let abcd = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xEE>(ab, cd));
    let half = _mm512_add_ps(abcd, _mm512_shuffle_f32x4::<0b01_00_11_10>(abcd, abcd));
    let quarter = _mm512_add_ps(half, _mm512_shuffle_f32x4::<0b10_11_00_01>(half, half));
    _mm512_castps512_ps128(quarter)
}

/// Sixteen bytes of each of sixteen rows, turned: register `i` has bytes `4i..4i+4` of every row.
///
/// # Safety
/// 16 bytes of each row are there, and the machine has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn turn(row: impl Fn(usize) -> *const u8) -> [__m512i; 4] {
    // SAFETY: by the caller.
    unsafe {
        // Row `4i + first` in quarter `i`: then 4 × 4 words change places inside each quarter.
        let quarters = |first: usize| {
            let row = |i: usize| _mm_loadu_si128(row(first + 4 * i).cast());
            let all = _mm512_castsi128_si512(row(0));
            let all = _mm512_inserti32x4::<1>(all, row(1));
            let all = _mm512_inserti32x4::<2>(all, row(2));
            _mm512_inserti32x4::<3>(all, row(3))
        };
        let (a, b, c, d) = (quarters(0), quarters(1), quarters(2), quarters(3));
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ef, gh) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ef, gh),
            _mm512_unpackhi_epi64(ef, gh),
        ]
    }
}

/// The mask of the first `n` lanes.
#[inline(always)]
pub(super) fn low(n: usize) -> u16 {
    if n >= 16 { u16::MAX } else { (1 << n) - 1 }
}

/// # Safety
/// As [`nt`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn nn<T: Wide>(a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    let mut j = 0;
    // SAFETY: strips begin inside the matrices, and their last register is masked to what is left of the columns.
    unsafe {
        while j + 16 < b.cols {
            nn_strip::<T, 2>(a, b, out, j, low(b.cols - j - 16), accumulate);
            j += 32;
        }
        if j < b.cols {
            nn_strip::<T, 1>(a, b, out, j, low(b.cols - j), accumulate);
        }
    }
}

/// # Safety
/// As [`nn`]; columns `j..j + 16 · (W − 1)` and those of the mask behind them exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn nn_strip<T: Wide, const W: usize>(a: Mat, b: Mat<T>, out: &mut OutMat, j: usize, last: u16, add: bool) {
    let mut i = 0;
    // SAFETY: `i + M <= a.rows`.
    unsafe {
        while i + 12 <= a.rows {
            nn_tile::<T, 12, W>(a, b, out, i, j, last, add);
            i += 12;
        }
        while i + 4 <= a.rows {
            nn_tile::<T, 4, W>(a, b, out, i, j, last, add);
            i += 4;
        }
        while i < a.rows {
            nn_tile::<T, 1, W>(a, b, out, i, j, last, add);
            i += 1;
        }
    }
}

/// # Safety
/// As [`nn_strip`]; rows `i..i+M` exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn nn_tile<T: Wide, const M: usize, const W: usize>(
    a: Mat,
    b: Mat<T>,
    out: &mut OutMat,
    i: usize,
    j: usize,
    last: u16,
    add: bool,
) {
    // SAFETY: `p < a.cols = b.rows`; columns and rows by the caller.
    unsafe {
        let x: [*const f32; M] = std::array::from_fn(|m| a.data.as_ptr().add((i + m) * a.stride));
        let y = b.data.as_ptr().add(j);
        let mask = |w: usize| if w + 1 == W { last } else { u16::MAX };
        let mut sums = [[_mm512_setzero_ps(); W]; M];
        for p in 0..a.cols {
            let mut ys = [_mm512_setzero_ps(); W];
            for (w, ys) in ys.iter_mut().enumerate() {
                *ys = T::load16_some(mask(w), y.add(p * b.stride + 16 * w));
            }
            for (sums, x) in sums.iter_mut().zip(&x) {
                let xs = _mm512_set1_ps(*x.add(p * a.step));
                for (sum, y) in sums.iter_mut().zip(&ys) {
                    *sum = _mm512_fmadd_ps(xs, *y, *sum);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (w, sum) in sums.iter().enumerate() {
                let place = out.data.add((i + m) * out.stride + j + 16 * w);
                let old = if add { _mm512_maskz_loadu_ps(mask(w), place) } else { _mm512_setzero_ps() };
                _mm512_mask_storeu_ps(place, mask(w), _mm512_add_ps(old, *sum));
            }
        }
    }
}
