//! Products of bf16 numbers summed in f32: twice the rate of f32 where the machine has AVX-512 BF16, the same
//! roundings through f32 kernels where it has not.

use std::cell::RefCell;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::{Isa, Mat, OutMat, elementwise::by_isa};

/// Two neighbouring numbers along the dimension that a product sums over.
pub type Pair = [bf16; 2];

/// Whether the chosen kernels multiply bf16 natively.
pub fn is_native() -> bool {
    #[cfg(target_arch = "x86_64")]
    return Isa::chosen() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `out = a · bᵀ`, or `out += a · bᵀ`: `a` is `(m, k)`, `b` is `(n, k)`, `out` is `(m, n)`.
pub fn nt(a: Mat<bf16>, b: Mat<bf16>, out: &mut OutMat, accumulate: bool) {
    assert!(a.cols == b.cols && a.rows == out.rows && b.rows == out.cols, "shapes differ");
    #[cfg(target_arch = "x86_64")]
    if is_native() {
        // SAFETY: the instructions are there; the shapes are checked here and in `Mat` and `OutMat`.
        return unsafe { native::nt(a, b, out, accumulate) };
    }
    widened_nt(a, b, out, accumulate);
}

fn widened_nt(a: Mat<bf16>, b: Mat<bf16>, out: &mut OutMat, accumulate: bool) {
    let wide = |x: Mat<bf16>| -> Vec<f32> {
        let rows = (0..x.rows).flat_map(|i| &x.data[i * x.stride..][..x.cols]);
        rows.map(|x| x.to_f32()).collect()
    };
    let (left, right) = (wide(a), wide(b));
    super::nt(Mat::new(&left, a.rows, a.cols), Mat::new(&right, b.rows, b.cols), out, accumulate);
}

/// `out = a · b`, or `out += a · b`: `a` is `(m, k)` in pairs along `k`, `b` is `(k, n)` in pairs along `k`, so
/// `(k/2, n)` pairs; `out` is `(m, n)`.
pub fn nn(a: Mat<Pair>, b: Mat<Pair>, out: &mut OutMat, accumulate: bool) {
    assert!(a.cols == b.rows && a.rows == out.rows && b.cols == out.cols, "shapes differ");
    #[cfg(target_arch = "x86_64")]
    if is_native() {
        // SAFETY: as in `nt`.
        return unsafe { native::nn(a, b, out, accumulate) };
    }
    widened_nn(a, b, out, accumulate);
}

fn widened_nn(a: Mat<Pair>, b: Mat<Pair>, out: &mut OutMat, accumulate: bool) {
    let wide: Vec<f32> =
        (0..a.rows).flat_map(|i| &a.data[i * a.stride..][..a.cols]).flatten().map(|x| x.to_f32()).collect();
    let mut rows = vec![0f32; 2 * b.rows * b.cols];
    for p in 0..b.rows {
        let (even, odd) = rows[2 * p * b.cols..][..2 * b.cols].split_at_mut(b.cols);
        for ((even, odd), pair) in even.iter_mut().zip(odd).zip(&b.data[p * b.stride..][..b.cols]) {
            (*even, *odd) = (pair[0].to_f32(), pair[1].to_f32());
        }
    }
    super::nn(Mat::new(&wide, a.rows, 2 * a.cols), Mat::new(&rows, 2 * b.rows, b.cols), out, accumulate);
}

/// `out = a · bᵀ` with `b` in bf16 and all else in f32: what `nt` gives for `b` widened.
pub fn nt_wide(a: Mat, b: Mat<bf16>, out: &mut OutMat, accumulate: bool) {
    assert!(a.cols == b.cols && a.rows == out.rows && b.rows == out.cols, "shapes differ");
    #[cfg(target_arch = "x86_64")]
    if Isa::chosen() == Isa::Avx512 {
        // SAFETY: the instructions are there; the shapes are checked here and in `Mat` and `OutMat`.
        return unsafe { avx512::nt(a, b, out, accumulate) };
    }
    widely(b, |b| super::nt(a, b, out, accumulate));
}

/// `out = a · b` with `b` in bf16 and all else in f32: what `nn` gives for `b` widened.
pub fn nn_wide(a: Mat, b: Mat<bf16>, out: &mut OutMat, accumulate: bool) {
    assert!(a.cols == b.rows && a.rows == out.rows && b.cols == out.cols, "shapes differ");
    #[cfg(target_arch = "x86_64")]
    if Isa::chosen() == Isa::Avx512 {
        // SAFETY: as in `nt_wide`.
        return unsafe { avx512::nn(a, b, out, accumulate) };
    }
    widely(b, |b| super::nn(a, b, out, accumulate));
}

thread_local! {
    static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Runs `f` on the same matrix in f32.
fn widely(x: Mat<bf16>, f: impl FnOnce(Mat)) {
    WIDE.with_borrow_mut(|wide| {
        let len = x.rows * x.cols;
        wide.resize(len.max(wide.len()), 0.0);
        for (row, wide) in wide[..len].chunks_mut(x.cols.max(1)).enumerate() {
            widen(&x.data[row * x.stride..][..x.cols], wide);
        }
        f(Mat::new(wide, x.rows, x.cols));
    });
}

/// To nearest, ties to even. A NaN may come out as an infinity: scores are checked, not operands.
#[inline(always)]
fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    bf16::from_bits(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16)
}

by_isa! {
    pub fn narrow(x: &[f32], out: &mut [bf16]) {
        for (y, x) in out.iter_mut().zip(x) {
            *y = round(*x);
        }
    }
}

by_isa! {
    pub fn widen(x: &[bf16], out: &mut [f32]) {
        for (y, x) in out.iter_mut().zip(x) {
            *y = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
}

by_isa! {
    /// Two rows to one of pairs.
    pub fn interleave(even: &[f32], odd: &[f32], out: &mut [Pair]) {
        for ((pair, even), odd) in out.iter_mut().zip(even).zip(odd) {
            *pair = [round(*even), round(*odd)];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod native {
    //! Tiles as in `avx512`, each step of the sum a pair.

    use std::arch::x86_64::*;

    use half::bf16;

    use super::{
        super::{
            OutMat,
            avx512::{low, put_row},
        },
        Mat, Pair,
    };

    /// # Safety
    /// The machine has AVX-512 F, BW and BF16; the shapes match.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn nt(a: Mat<bf16>, b: Mat<bf16>, out: &mut OutMat, add: bool) {
        let mut i = 0;
        // SAFETY: every tile lies inside the matrices: `i + M <= a.rows`.
        unsafe {
            while i + 6 <= a.rows {
                nt_rows::<6, 4>(a, b, out, i, add);
                i += 6;
            }
            while i < a.rows {
                nt_rows::<1, 8>(a, b, out, i, add);
                i += 1;
            }
        }
    }

    /// # Safety
    /// As [`nt`]; rows `i..i+M` exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn nt_rows<const M: usize, const N: usize>(
        a: Mat<bf16>,
        b: Mat<bf16>,
        out: &mut OutMat,
        i: usize,
        add: bool,
    ) {
        let mut j = 0;
        // SAFETY: `j + N <= b.rows`.
        unsafe {
            while j + N <= b.rows {
                nt_tile::<M, N>(a, b, out, i, j, add);
                j += N;
            }
            while j < b.rows {
                nt_tile::<M, 1>(a, b, out, i, j, add);
                j += 1;
            }
        }
    }

    /// # Safety
    /// As [`nt`]; rows `i..i+M` and `j..j+N` exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn nt_tile<const M: usize, const N: usize>(
        a: Mat<bf16>,
        b: Mat<bf16>,
        out: &mut OutMat,
        i: usize,
        j: usize,
        add: bool,
    ) {
        let k = a.cols;
        // SAFETY: the mask keeps every load inside a row, and rows are inside their slices.
        unsafe {
            let x: [*const bf16; M] = std::array::from_fn(|m| a.data.as_ptr().add((i + m) * a.stride));
            let y: [*const bf16; N] = std::array::from_fn(|n| b.data.as_ptr().add((j + n) * b.stride));
            let mut sums = [[_mm512_setzero_ps(); N]; M];
            let mut p = 0;
            while p + 32 <= k {
                let ys: [__m512bh; N] = std::array::from_fn(|n| load(y[n].add(p), u32::MAX));
                for (sums, x) in sums.iter_mut().zip(&x) {
                    let xs = load(x.add(p), u32::MAX);
                    for (sum, y) in sums.iter_mut().zip(&ys) {
                        *sum = _mm512_dpbf16_ps(*sum, xs, *y);
                    }
                }
                p += 32;
            }
            if p < k {
                let mask = (1u32 << (k - p)) - 1;
                let ys: [__m512bh; N] = std::array::from_fn(|n| load(y[n].add(p), mask));
                for (sums, x) in sums.iter_mut().zip(&x) {
                    let xs = load(x.add(p), mask);
                    for (sum, y) in sums.iter_mut().zip(&ys) {
                        *sum = _mm512_dpbf16_ps(*sum, xs, *y);
                    }
                }
            }
            for (m, sums) in sums.iter().enumerate() {
                put_row(sums, out.data.add((i + m) * out.stride + j), add);
            }
        }
    }

    /// # Safety
    /// The masked lanes behind `from` are there to read.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn load(from: *const bf16, mask: u32) -> __m512bh {
        // SAFETY: by the caller; both types are 512 plain bits.
        unsafe {
            let bits = if mask == u32::MAX {
                _mm512_loadu_si512(from.cast())
            } else {
                _mm512_maskz_loadu_epi16(mask, from.cast())
            };
            std::mem::transmute::<__m512i, __m512bh>(bits)
        }
    }

    /// # Safety
    /// The machine has AVX-512 F, BW and BF16; the shapes match.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn nn(a: Mat<Pair>, b: Mat<Pair>, out: &mut OutMat, add: bool) {
        let mut j = 0;
        // SAFETY: strips begin inside the matrices, and their last register is masked to what is left of the columns.
        unsafe {
            while j + 16 < b.cols {
                nn_strip::<2>(a, b, out, j, low(b.cols - j - 16), add);
                j += 32;
            }
            if j < b.cols {
                nn_strip::<1>(a, b, out, j, low(b.cols - j), add);
            }
        }
    }

    /// # Safety
    /// As [`nn`]; columns `j..j + 16 · (W − 1)` and those of the mask behind them exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn nn_strip<const W: usize>(a: Mat<Pair>, b: Mat<Pair>, out: &mut OutMat, j: usize, last: u16, add: bool) {
        let mut i = 0;
        // SAFETY: `i + M <= a.rows`.
        unsafe {
            while i + 12 <= a.rows {
                nn_tile::<12, W>(a, b, out, i, j, last, add);
                i += 12;
            }
            while i + 4 <= a.rows {
                nn_tile::<4, W>(a, b, out, i, j, last, add);
                i += 4;
            }
            while i < a.rows {
                nn_tile::<1, W>(a, b, out, i, j, last, add);
                i += 1;
            }
        }
    }

    /// # Safety
    /// As [`nn_strip`]; rows `i..i+M` exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn nn_tile<const M: usize, const W: usize>(
        a: Mat<Pair>,
        b: Mat<Pair>,
        out: &mut OutMat,
        i: usize,
        j: usize,
        last: u16,
        add: bool,
    ) {
        // SAFETY: `p < a.cols = b.rows`; columns and rows by the caller; a pair is 32 plain bits.
        unsafe {
            let x: [*const i32; M] = std::array::from_fn(|m| a.data.as_ptr().add((i + m) * a.stride).cast());
            let y: *const i32 = b.data.as_ptr().add(j).cast();
            let mask = |w: usize| if w + 1 == W { last } else { u16::MAX };
            let mut sums = [[_mm512_setzero_ps(); W]; M];
            for p in 0..a.cols {
                let ys: [__m512bh; W] = std::array::from_fn(|w| {
                    let bits = _mm512_maskz_loadu_epi32(mask(w), y.add(p * b.stride + 16 * w));
                    std::mem::transmute::<__m512i, __m512bh>(bits)
                });
                for (sums, x) in sums.iter_mut().zip(&x) {
                    let bits = _mm512_set1_epi32(x.add(p).read_unaligned());
                    let xs = std::mem::transmute::<__m512i, __m512bh>(bits);
                    for (sum, y) in sums.iter_mut().zip(&ys) {
                        *sum = _mm512_dpbf16_ps(*sum, xs, *y);
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
}

#[cfg(test)]
mod tests {
    use super::*;

    type Product<T> = fn(Mat<T>, Mat<T>, &mut OutMat, bool);

    const SHAPES: [(usize, usize, usize); 6] =
        [(1, 1, 2), (1, 17, 48), (4, 3, 8), (13, 25, 34), (25, 50, 98), (7, 33, 576)];

    fn random(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn narrowed(x: &[f32]) -> Vec<bf16> {
        let mut y = vec![bf16::ZERO; x.len()];
        narrow(x, &mut y);
        y
    }

    /// Rounding is the `half` crate's, also of ties.
    #[test]
    fn numbers_are_rounded_to_nearest_even() {
        let ties = (0..64u32).map(|i| f32::from_bits(0x3F80_8000 + (i << 16)));
        let x: Vec<f32> = random(999, 1).into_iter().chain(ties).chain([0.0, -0.0, 1e-40, f32::MAX]).collect();
        for (x, y) in x.iter().zip(narrowed(&x)) {
            assert_eq!(y.to_bits(), bf16::from_f32(*x).to_bits(), "{x}");
        }
    }

    /// Products in f64 of the rounded numbers against both ways, and each row alone to the same bits.
    #[test]
    fn products_agree_with_f64() {
        for (m, n, k) in SHAPES {
            let (a, b) = (random(m * k, 3), random(n * k, 5));
            let (a16, b16) = (narrowed(&a), narrowed(&b));
            let mut pairs = vec![[bf16::ZERO; 2]; k / 2 * n];
            for (p, pairs) in pairs.chunks_mut(n).enumerate() {
                let column = |q: usize| (0..n).map(|j| b[j * k + q]).collect::<Vec<_>>();
                interleave(&column(2 * p), &column(2 * p + 1), pairs);
            }
            let left = a16.as_chunks::<2>().0;
            let check = |out: &[f32], what: &str| {
                for i in 0..m {
                    for j in 0..n {
                        let at = |p: usize| a16[i * k + p].to_f64() * b16[j * k + p].to_f64();
                        let want: f64 = 0.5 + (0..k).map(at).sum::<f64>();
                        let got = f64::from(out[i * n + j]);
                        assert!((got - want).abs() < 2e-6 * k as f64 + 1e-6, "{what} {m} {n} {k}: {got} {want}");
                    }
                }
            };
            for (name, product) in [("nt", nt as Product<bf16>), ("widened nt", widened_nt)] {
                let mut out = vec![0.5; m * n];
                product(Mat::new(&a16, m, k), Mat::new(&b16, n, k), &mut OutMat::of(&mut out, m, n), true);
                check(&out, name);
                for i in 0..m {
                    let mut one = vec![0.5; n];
                    let row = Mat::new(&a16[i * k..][..k], 1, k);
                    product(row, Mat::new(&b16, n, k), &mut OutMat::of(&mut one, 1, n), true);
                    assert_eq!(one, out[i * n..][..n], "{name} {m} {n} {k}");
                }
            }
            for (name, product) in [("nn", nn as Product<Pair>), ("widened nn", widened_nn)] {
                let mut out = vec![0.5; m * n];
                product(Mat::new(left, m, k / 2), Mat::new(&pairs, k / 2, n), &mut OutMat::of(&mut out, m, n), true);
                check(&out, name);
                for i in 0..m {
                    let mut one = vec![0.5; n];
                    let row = Mat::new(&left[i * k / 2..][..k / 2], 1, k / 2);
                    product(row, Mat::new(&pairs, k / 2, n), &mut OutMat::of(&mut one, 1, n), true);
                    assert_eq!(one, out[i * n..][..n], "{name} {m} {n} {k}");
                }
            }
        }
    }
}
