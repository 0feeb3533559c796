//! Products of bf16 numbers summed in f32: native where the machine has AMX or AVX-512 BF16, the same roundings through
//! f32 kernels where it has not.

use std::mem::MaybeUninit;

use half::bf16;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::{Isa, Mat, OutMat, elementwise::by_isa, filled};

/// Two neighbouring numbers along the dimension that a product sums over.
pub type Pair = [bf16; 2];

/// Whether the chosen kernels multiply bf16 natively.
pub fn is_native() -> bool {
    let isa = Isa::chosen();
    isa == Isa::Amx || has_native(isa)
}

/// Whether the machine has AVX-512 BF16 and may use it.
fn has_native(isa: Isa) -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Rows of the right side of [`nt`] that are best given at once: two tiles of AMX and not more, which stay nearer than the
/// left side that passes by.
pub fn full_rows() -> usize {
    if Isa::chosen() == Isa::Amx { 32 } else { 4 }
}

/// Rows of the right side of [`nn`] that are given at once: whole tiles, as many as the second-level cache keeps of
/// some columns beside the left side.
pub const DEPTH: usize = 640;

/// Numbers of a line of cache.
pub const LINE: usize = 32;

/// A line of cache: what the kernels read begins and ends with one.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Line(pub [bf16; LINE]);

impl Line {
    pub const ZERO: Line = Line([bf16::ZERO; LINE]);
}

/// The numbers of lines, one line behind another.
pub fn numbers(lines: &[Line]) -> &[bf16] {
    // SAFETY: a line is its numbers and nothing else.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), LINE * lines.len()) }
}

/// As [`numbers`].
pub fn numbers_mut(lines: &mut [Line]) -> &mut [bf16] {
    // SAFETY: as above; the lines are borrowed as long as their numbers.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), LINE * lines.len()) }
}

/// The left side of products, rounded and laid out for the kernels that read it. Rows end with whole lines, zeros behind
/// their numbers; lines stand row by row, but for AMX sixteen rows take turns, so that each of its tiles is one piece.
pub struct Rows {
    isa: Isa,
    lines: Vec<Line>,
    rows: usize,
    cols: usize,
}

/// Rows whose lines take turns, in the layout for AMX: those of a tile.
pub(super) const SIDE: usize = 16;

impl Rows {
    pub fn narrow(x: Mat) -> Self {
        let isa = Isa::chosen();
        Self::laid(isa, x, |lines| {
            let per_chunk = (SIDE * x.cols.div_ceil(LINE)).max(1);
            let chunks = lines.par_chunks_mut(per_chunk).enumerate();
            chunks.for_each(|(t, lines)| lay(isa, x, SIDE * t, lines, narrow_lines));
        })
    }

    /// The same on this thread alone.
    pub fn narrow_here(x: Mat) -> Self {
        Self::here(Isa::chosen(), x, narrow_lines)
    }

    /// For any kernels, without asking which are chosen.
    pub(super) fn narrow_for(isa: Isa, x: Mat) -> Self {
        Self::here(isa, x, round_lines)
    }

    fn here(isa: Isa, x: Mat, narrow: Narrow) -> Self {
        Self::laid(isa, x, |lines| {
            let chunks = lines.chunks_mut((SIDE * x.cols.div_ceil(LINE)).max(1)).enumerate();
            chunks.for_each(|(t, lines)| lay(isa, x, SIDE * t, lines, narrow));
        })
    }

    /// `fill` writes every line.
    fn laid(isa: Isa, x: Mat, fill: impl FnOnce(&mut [MaybeUninit<Line>])) -> Self {
        let rows = if isa == Isa::Amx { x.rows.next_multiple_of(SIDE) } else { x.rows };
        // SAFETY: all callers lay all rows, sixteen at a time.
        let lines = unsafe { filled(rows * x.cols.div_ceil(LINE), fill) };
        Self { isa, lines, rows: x.rows, cols: x.cols }
    }

    /// Of the first rows the columns from one on as plain rows, which AMX's are not.
    fn mat(&self, rows: usize, from: usize, cols: usize) -> Mat<'_, bf16> {
        let stride = self.cols.div_ceil(LINE) * LINE;
        Mat::strided(&numbers(&self.lines)[from.min(self.rows * stride)..], rows, cols, stride)
    }
}

/// A row to its lines, so many apart.
type Narrow = fn(&[f32], &mut [MaybeUninit<Line>], usize);

/// Up to sixteen rows from `first` on, and for AMX zeros behind the last row.
fn lay(isa: Isa, x: Mat, first: usize, lines: &mut [MaybeUninit<Line>], narrow: Narrow) {
    let (count, per_row) = (SIDE.min(x.rows - first), x.cols.div_ceil(LINE));
    for i in 0..count {
        let row = &x.data[(first + i) * x.stride..][..x.cols];
        match isa {
            Isa::Amx => narrow(row, &mut lines[i..], SIDE),
            _ => narrow(row, &mut lines[i * per_row..][..per_row], 1),
        }
    }
    if isa == Isa::Amx {
        lines.chunks_mut(SIDE).for_each(|tile| tile[count..].fill(MaybeUninit::new(Line::ZERO)));
    }
}

#[inline(always)]
fn round_lines(row: &[f32], lines: &mut [MaybeUninit<Line>], step: usize) {
    for (x, line) in row.chunks(LINE).zip(lines.iter_mut().step_by(step)) {
        let mut y = [bf16::ZERO; LINE];
        y.iter_mut().zip(x).for_each(|(y, x)| *y = round(*x));
        line.write(Line(y));
    }
}

by_isa! {
    /// A row's lines, `step` apart.
    pub fn narrow_lines(row: &[f32], lines: &mut [MaybeUninit<Line>], step: usize) {
        round_lines(row, lines, step);
    }
}

/// `out = a · bᵀ`, or `out += a · bᵀ`: `a` is `(m, k)`, `b` is `(n, k)`, `out` is `(m, n)`.
pub fn nt(a: &Rows, b: Mat<bf16>, out: &mut OutMat, accumulate: bool) {
    assert!(a.cols == b.cols && a.rows == out.rows && b.rows == out.cols, "shapes differ");
    match a.isa {
        // SAFETY: the instructions are there; the shapes are checked here and in `Mat` and `OutMat`.
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => unsafe { amx::nt(&a.lines, b, out, accumulate) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        isa if has_native(isa) => unsafe { native::nt(a.mat(a.rows, 0, a.cols), b, out, accumulate) },
        isa => widened_nt(isa, a.mat(a.rows, 0, a.cols), b, out, accumulate),
    }
}

fn widened_nt(isa: Isa, a: Mat<bf16>, b: Mat<bf16>, out: &mut OutMat, accumulate: bool) {
    let wide = |x: Mat<bf16>| -> Vec<f32> {
        let rows = (0..x.rows).flat_map(|i| &x.data[i * x.stride..][..x.cols]);
        rows.map(|x| x.to_f32()).collect()
    };
    let (left, right) = (wide(a), wide(b));
    super::nt_with(isa, Mat::new(&left, a.rows, a.cols), Mat::new(&right, b.rows, b.cols), out, accumulate);
}

/// `out = a · b`, or `out += a · b`: of `a` the first rows, as many as `out` has, and those columns from the given one on,
/// a multiple of [`LINE`], that `b` has rows for; `b` is `(k, n)` in pairs along `k`, so `(k/2, n)` pairs, of which the last
/// may go over the end of `a`'s rows with a zero; `out` is `(m, n)`.
pub fn nn(a: &Rows, from: usize, b: Mat<Pair>, out: &mut OutMat, accumulate: bool) {
    assert!(a.rows >= out.rows && b.cols == out.cols, "shapes differ");
    assert!(from.is_multiple_of(LINE) && from + 2 * b.rows <= a.cols.next_multiple_of(2), "columns outside the rows");
    match a.isa {
        // SAFETY: as in `nt`.
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => unsafe { amx::nn(&a.lines, a.cols, from, b, out, accumulate) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        isa if has_native(isa) => unsafe { native::nn(pairs(a.mat(out.rows, from, 2 * b.rows)), b, out, accumulate) },
        isa => widened_nn(isa, pairs(a.mat(out.rows, from, 2 * b.rows)), b, out, accumulate),
    }
}

/// Rows of whole lines in pairs.
fn pairs(x: Mat<bf16>) -> Mat<Pair> {
    Mat::strided(x.data.as_chunks::<2>().0, x.rows, x.cols / 2, x.stride / 2)
}

fn widened_nn(isa: Isa, a: Mat<Pair>, b: Mat<Pair>, out: &mut OutMat, accumulate: bool) {
    let wide: Vec<f32> =
        (0..a.rows).flat_map(|i| &a.data[i * a.stride..][..a.cols]).flatten().map(|x| x.to_f32()).collect();
    let mut rows = vec![0f32; 2 * b.rows * b.cols];
    for p in 0..b.rows {
        let (even, odd) = rows[2 * p * b.cols..][..2 * b.cols].split_at_mut(b.cols);
        for ((even, odd), pair) in even.iter_mut().zip(odd).zip(&b.data[p * b.stride..][..b.cols]) {
            (*even, *odd) = (pair[0].to_f32(), pair[1].to_f32());
        }
    }
    super::nn_with(isa, Mat::new(&wide, a.rows, 2 * a.cols), Mat::new(&rows, 2 * b.rows, b.cols), out, accumulate);
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
mod tests;
