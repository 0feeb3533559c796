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
    // SAFETY: by the caller. Two neighbours of `maddubs` are at most 2 · 127 times the largest code, and so many such
    // pairs make less than 2¹⁵: 8 · 15, 4 · 31, 2 · 63.
    unsafe {
        match panel.bits() {
            4 => nt_tiles::<8, false>(x, panel, out),
            5 => nt_tiles::<4, false>(x, panel, out),
            6 => nt_tiles::<2, false>(x, panel, out),
            _ => nt_tiles::<1, true>(x, panel, out),
        }
    }
}

/// # Safety
/// As [`nt`]; `PAIRS` sums of two neighbours fit into 16 bits, and a block has a multiple of `PAIRS` lines.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn nt_tiles<const PAIRS: usize, const IS_WIDE: bool>(x: &Rows, panel: &Panel, out: &mut OutMat) {
    for eight in (0..out.cols).step_by(8) {
        let mut i = 0;
        // SAFETY: `i + M <= x.rows`.
        unsafe {
            while i + 4 <= x.rows {
                nt_tile::<4, PAIRS, IS_WIDE>(x, panel, out, i, eight);
                i += 4;
            }
            while i < x.rows {
                nt_tile::<1, PAIRS, IS_WIDE>(x, panel, out, i, eight);
                i += 1;
            }
        }
    }
}

/// Codes of eight bits are made signed, `c − 128`, and the sign of each goes over to the other factor; what that leaves
/// out comes back with the block's minimum.
///
/// # Safety
/// As [`nt_tiles`]; rows `i..i+M` exist, and `eight` is 0 or 8.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn nt_tile<const M: usize, const PAIRS: usize, const IS_WIDE: bool>(
    x: &Rows,
    panel: &Panel,
    out: &mut OutMat,
    i: usize,
    eight: usize,
) {
    let (lines, scales, mins) = panel.parts();
    let steps = panel.block() / 4;
    let rows: [_; M] = std::array::from_fn(|m| x.row(i + m));
    let mut totals = [_mm256_setzero_ps(); M];
    // SAFETY: a panel and a row have as many blocks, each of `steps` lines and `4 · steps` codes; lines are aligned.
    unsafe {
        for b in 0..scales.len() {
            let mut dots = [_mm256_setzero_si256(); M];
            for few in (steps * b..steps * (b + 1)).step_by(PAIRS) {
                let mut pairs = [_mm256_setzero_si256(); M];
                for s in few..few + PAIRS {
                    let weights = _mm256_load_si256(lines.get_unchecked(s).0.as_ptr().add(eight).cast());
                    let signed = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
                    for (pairs, (codes, ..)) in pairs.iter_mut().zip(&rows) {
                        let codes = _mm256_set1_epi32(codes.as_ptr().cast::<i32>().add(s).read_unaligned());
                        let two = match IS_WIDE {
                            true => _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(codes, signed)),
                            false => _mm256_maddubs_epi16(weights, codes),
                        };
                        *pairs = _mm256_add_epi16(*pairs, two);
                    }
                }
                for (dot, pairs) in dots.iter_mut().zip(pairs) {
                    *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                }
            }
            let scale = _mm256_load_ps(scales.get_unchecked(b).0.as_ptr().add(eight));
            let mut min = _mm256_load_ps(mins.get_unchecked(b).0.as_ptr().add(eight));
            if IS_WIDE {
                min = _mm256_fmadd_ps(scale, _mm256_set1_ps(128.0), min);
            }
            for ((total, dot), (_, x_scales, x_sums)) in totals.iter_mut().zip(dots).zip(&rows) {
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
