//! The int8 product with AVX2: as with AVX-512, eight rows of weights at a time.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::{
    super::OutMat,
    Rows,
    panel::{LANES, LEVELS, Line, Panel, Source, Turn},
};
use crate::formats::Storage;

struct Shuffles;

impl Turn for Shuffles {
    #[inline(always)]
    unsafe fn turn(source: &Source, at: usize) -> [Line; 4] {
        let mut lines = [Line([0; LANES]); 4];
        for eight in [0, 8] {
            // SAFETY: 16 bytes of each row are there, and the instructions, by the caller; lines are 16 words.
            unsafe {
                // Lane `4i + first` in half `i`: then 4 × 4 words change places inside each half.
                let halves = |first: usize| {
                    let row = |i: usize| _mm_loadu_si128(source.row(eight + first + 4 * i, at).cast());
                    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(0)), row(1))
                };
                let (a, b, c, d) = (halves(0), halves(1), halves(2), halves(3));
                let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                let (ef, gh) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                let turned = [
                    _mm256_unpacklo_epi64(ab, cd),
                    _mm256_unpackhi_epi64(ab, cd),
                    _mm256_unpacklo_epi64(ef, gh),
                    _mm256_unpackhi_epi64(ef, gh),
                ];
                for (line, turned) in lines.iter_mut().zip(turned) {
                    _mm256_store_si256(line.0.as_mut_ptr().add(eight).cast(), turned);
                }
            }
        }
        lines
    }

    #[inline(always)]
    unsafe fn levels(codes: Line) -> Line {
        let mut lines = codes;
        // SAFETY: the instructions are there, by the caller; a line is 64 aligned bytes, and the table 16.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(LEVELS.as_ptr().cast()));
            for eight in [0, 8] {
                let place = lines.0.as_mut_ptr().add(eight).cast();
                _mm256_store_si256(place, _mm256_shuffle_epi8(table, _mm256_load_si256(place)));
            }
        }
        lines
    }
}

/// # Safety
/// As [`Panel::unpack`]; the machine has the instructions of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn unpack(panel: &mut Panel, storage: Storage, source: &Source) {
    // SAFETY: by the caller.
    unsafe { panel.unpack::<Shuffles>(storage, source) }
}

/// # Safety
/// The machine has AVX2 and FMA; the shapes match.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn nt(x: &Rows, panel: &Panel, out: &mut OutMat) {
    for eight in (0..out.cols).step_by(8) {
        let mut i = 0;
        // SAFETY: `i + M <= x.rows`.
        unsafe {
            while i + 4 <= x.rows {
                nt_tile::<4>(x, panel, out, i, eight);
                i += 4;
            }
            while i < x.rows {
                nt_tile::<1>(x, panel, out, i, eight);
                i += 1;
            }
        }
    }
}

/// Products of four neighbours, summed. The pairs of `maddubs` have 16 bits: enough for codes of seven bits; wider
/// ones are made signed, `c − 128`, and the sign of each goes over to the other factor.
#[inline]
#[target_feature(enable = "avx2")]
fn dot(codes: __m256i, x: __m256i, is_wide: bool) -> __m256i {
    let pairs = if is_wide {
        let signed = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
        _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed))
    } else {
        _mm256_maddubs_epi16(codes, x)
    };
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// # Safety
/// As [`nt`]; rows `i..i+M` exist, and `eight` is 0 or 8.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn nt_tile<const M: usize>(x: &Rows, panel: &Panel, out: &mut OutMat, i: usize, eight: usize) {
    let (lines, scales, mins) = panel.parts();
    let (steps, is_wide) = (panel.block() / 4, panel.is_wide());
    let rows: [_; M] = std::array::from_fn(|m| x.row(i + m));
    let mut totals = [_mm256_setzero_ps(); M];
    // SAFETY: a panel and a row have as many blocks, each of `steps` lines and `4 · steps` codes; lines are aligned.
    unsafe {
        for b in 0..scales.len() {
            let mut dots = [_mm256_setzero_si256(); M];
            let mut sums = dots;
            for s in steps * b..steps * (b + 1) {
                let weights = _mm256_load_si256(lines.get_unchecked(s).0.as_ptr().add(eight).cast());
                for ((total, sum), (codes, ..)) in dots.iter_mut().zip(&mut sums).zip(&rows) {
                    let codes = _mm256_set1_epi32(codes.as_ptr().cast::<i32>().add(s).read_unaligned());
                    *total = _mm256_add_epi32(*total, dot(weights, codes, is_wide));
                    if is_wide {
                        // What `c − 128` left out.
                        *sum = _mm256_add_epi32(*sum, dot(_mm256_set1_epi8(1), codes, false));
                    }
                }
            }
            let scale = _mm256_load_ps(scales.get_unchecked(b).0.as_ptr().add(eight));
            let min = _mm256_load_ps(mins.get_unchecked(b).0.as_ptr().add(eight));
            for ((total, (dot, sum)), (_, x_scales, x_sums)) in
                totals.iter_mut().zip(dots.into_iter().zip(sums)).zip(&rows)
            {
                let dot = _mm256_add_epi32(dot, _mm256_slli_epi32::<7>(sum));
                let factor = _mm256_mul_ps(scale, _mm256_set1_ps(*x_scales.get_unchecked(b)));
                *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, *total);
                *total = _mm256_fmadd_ps(min, _mm256_set1_ps(*x_sums.get_unchecked(b)), *total);
            }
        }
        for (m, total) in totals.into_iter().enumerate() {
            let mut lanes = [0f32; 8];
            _mm256_storeu_ps(lanes.as_mut_ptr(), total);
            let place = out.data.add((i + m) * out.stride + eight);
            place.copy_from_nonoverlapping(lanes.as_ptr(), (out.cols - eight).min(8));
        }
    }
}
