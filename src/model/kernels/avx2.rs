//! The products with AVX2 and FMA.
//!
//! `nt` keeps one accumulator of 8 lanes for each output element, in tiles of 4 × 3 (12 of the 16 registers), so the
//! order of a sum does not depend on the tile. `nn` keeps tiles of 6 rows × 16 columns, each lane summing in the order
//! of `k`.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::{Mat, OutMat, Wide};

/// # Safety
/// The machine has AVX2 and FMA; `a`, `b` and `out` have matching shapes.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn nt<T: Wide>(a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    let mut i = 0;
    // SAFETY: every tile lies inside the matrices: `i + M <= a.rows` and `j + N <= b.rows`.
    unsafe {
        while i + 4 <= a.rows {
            let mut j = 0;
            while j + 3 <= b.rows {
                nt_tile::<T, 4, 3>(a, b, out, i, j, accumulate);
                j += 3;
            }
            while j < b.rows {
                nt_tile::<T, 4, 1>(a, b, out, i, j, accumulate);
                j += 1;
            }
            i += 4;
        }
        while i < a.rows {
            let mut j = 0;
            while j + 8 <= b.rows {
                nt_tile::<T, 1, 8>(a, b, out, i, j, accumulate);
                j += 8;
            }
            while j < b.rows {
                nt_tile::<T, 1, 1>(a, b, out, i, j, accumulate);
                j += 1;
            }
            i += 1;
        }
    }
}

/// # Safety
/// As [`nt`]; rows `i..i+M` and `j..j+N` exist.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn nt_tile<T: Wide, const M: usize, const N: usize>(
    a: Mat,
    b: Mat<T>,
    out: &mut OutMat,
    i: usize,
    j: usize,
    add: bool,
) {
    let k = a.cols;
    // SAFETY: `p + 8 <= k` and `p < k` keep every load inside a row, and rows are inside their slices.
    unsafe {
        let x: [*const f32; M] = std::array::from_fn(|m| a.data.as_ptr().add((i + m) * a.stride));
        let y: [*const T; N] = std::array::from_fn(|n| b.data.as_ptr().add((j + n) * b.stride));
        let mut sums = [[_mm256_setzero_ps(); N]; M];
        let mut p = 0;
        while p + 8 <= k {
            let ys: [__m256; N] = std::array::from_fn(|n| T::load8(y[n].add(p)));
            for (sums, x) in sums.iter_mut().zip(&x) {
                let xs = _mm256_loadu_ps(x.add(p));
                for (sum, y) in sums.iter_mut().zip(&ys) {
                    *sum = _mm256_fmadd_ps(xs, *y, *sum);
                }
            }
            p += 8;
        }
        for (m, sums) in sums.iter().enumerate() {
            for n in (0..N).step_by(4) {
                let row: [__m256; 4] = std::array::from_fn(|i| sums[(n + i).min(N - 1)]);
                let mut totals = [0f32; 4];
                _mm_storeu_ps(totals.as_mut_ptr(), horizontal_sums(row));
                for (n, total) in (n..N.min(n + 4)).zip(totals) {
                    let mut sum = total;
                    for q in p..k {
                        sum = (*x[m].add(q)).mul_add((*y[n].add(q)).number(), sum);
                    }
                    let place = out.data.add((i + m) * out.stride + j + n);
                    *place = if add { *place + sum } else { sum };
                }
            }
        }
    }
}

/// The sum of each register's lanes, in an order that is the same for all four.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn horizontal_sums([a, b, c, d]: [__m256; 4]) -> __m128 {
    let quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps::<1>(quarters))
}

/// # Safety
/// The machine has AVX2 and FMA; `a`, `b` and `out` have matching shapes.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn nn<T: Wide>(a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    let mut j = 0;
    // SAFETY: every strip lies inside the matrices: `j + 8 · W <= b.cols`.
    unsafe {
        // A row alone takes a whole line of memory at a time.
        while a.rows == 1 && j + 64 <= b.cols {
            nn_tile::<T, 1, 8>(a, b, out, 0, j, accumulate);
            j += 64;
        }
        while j + 16 <= b.cols {
            nn_strip::<T, 2>(a, b, out, j, accumulate);
            j += 16;
        }
        while j + 8 <= b.cols {
            nn_strip::<T, 1>(a, b, out, j, accumulate);
            j += 8;
        }
        for i in 0..a.rows {
            for c in j..b.cols {
                let mut sum = 0f32;
                for p in 0..a.cols {
                    let x = a.data.get_unchecked(i * a.stride + p * a.step);
                    sum = x.mul_add(b.data.get_unchecked(p * b.stride + c).number(), sum);
                }
                let place = out.data.add(i * out.stride + c);
                *place = if accumulate { *place + sum } else { sum };
            }
        }
    }
}

/// # Safety
/// As [`nn`]; columns `j..j + 8 · W` exist.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn nn_strip<T: Wide, const W: usize>(a: Mat, b: Mat<T>, out: &mut OutMat, j: usize, add: bool) {
    let mut i = 0;
    // SAFETY: `i + M <= a.rows`.
    unsafe {
        while i + 6 <= a.rows {
            nn_tile::<T, 6, W>(a, b, out, i, j, add);
            i += 6;
        }
        while i + 2 <= a.rows {
            nn_tile::<T, 2, W>(a, b, out, i, j, add);
            i += 2;
        }
        while i < a.rows {
            nn_tile::<T, 1, W>(a, b, out, i, j, add);
            i += 1;
        }
    }
}

/// # Safety
/// As [`nn`]; rows `i..i+M` and columns `j..j + 8 · W` exist.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn nn_tile<T: Wide, const M: usize, const W: usize>(
    a: Mat,
    b: Mat<T>,
    out: &mut OutMat,
    i: usize,
    j: usize,
    add: bool,
) {
    // SAFETY: `p < a.cols = b.rows`; columns and rows by the caller.
    unsafe {
        let x: [*const f32; M] = std::array::from_fn(|m| a.data.as_ptr().add((i + m) * a.stride));
        let y = b.data.as_ptr().add(j);
        let mut sums = [[_mm256_setzero_ps(); W]; M];
        for p in 0..a.cols {
            let ys: [__m256; W] = std::array::from_fn(|w| T::load8(y.add(p * b.stride + 8 * w)));
            for (sums, x) in sums.iter_mut().zip(&x) {
                let xs = _mm256_broadcast_ss(&*x.add(p * a.step));
                for (sum, y) in sums.iter_mut().zip(&ys) {
                    *sum = _mm256_fmadd_ps(xs, *y, *sum);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (w, sum) in sums.iter().enumerate() {
                let place = out.data.add((i + m) * out.stride + j + 8 * w);
                let sum = if add { _mm256_add_ps(_mm256_loadu_ps(place), *sum) } else { *sum };
                _mm256_storeu_ps(place, sum);
            }
        }
    }
}
