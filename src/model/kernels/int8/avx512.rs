//! The int8 product with AVX-512 VNNI: a register holds four codes of sixteen rows of weights, and is multiplied by
//! four codes of a row, broadcast from memory.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::{
    super::{OutMat, avx512::low},
    Rows,
    panel::{LEVELS, Line, Panel, Source, Turn},
};
use crate::formats::Storage;

struct Shuffles;

impl Turn for Shuffles {
    #[inline(always)]
    unsafe fn turn(source: &Source, at: usize) -> [Line; 4] {
        // SAFETY: 16 bytes of each row are there, and the instructions, by the caller.
        unsafe {
            // Lane `4i + first` in quarter `i`: then 4 × 4 words change places inside each quarter.
            let quarters = |first: usize| {
                let row = |i: usize| _mm_loadu_si128(source.row(first + 4 * i, at).cast());
                let all = _mm512_castsi128_si512(row(0));
                let all = _mm512_inserti32x4::<1>(all, row(1));
                let all = _mm512_inserti32x4::<2>(all, row(2));
                _mm512_inserti32x4::<3>(all, row(3))
            };
            let (a, b, c, d) = (quarters(0), quarters(1), quarters(2), quarters(3));
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (ef, gh) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            let lines = [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ef, gh),
                _mm512_unpackhi_epi64(ef, gh),
            ];
            lines.map(|line| std::mem::transmute::<__m512i, Line>(line))
        }
    }

    #[inline(always)]
    unsafe fn levels(codes: Line) -> Line {
        // SAFETY: the instructions are there, by the caller; a line is 64 aligned bytes, and the table 16.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(LEVELS.as_ptr().cast()));
            let levels = _mm512_shuffle_epi8(table, _mm512_load_si512(codes.0.as_ptr().cast()));
            std::mem::transmute::<__m512i, Line>(levels)
        }
    }
}

/// # Safety
/// As [`Panel::unpack`]; the machine has the instructions of `Isa::Avx512`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub unsafe fn unpack(panel: &mut Panel, storage: Storage, source: &Source) {
    // SAFETY: by the caller.
    unsafe { panel.unpack::<Shuffles>(storage, source) }
}

/// # Safety
/// The machine has AVX-512 F and VNNI; the shapes match.
#[target_feature(enable = "avx512f,avx512vnni")]
pub unsafe fn nt(x: &Rows, panel: &Panel, out: &mut OutMat) {
    // SAFETY: by the caller.
    unsafe {
        match panel.block() {
            16 => nt_blocks::<4>(x, panel, out),
            _ => nt_blocks::<8>(x, panel, out),
        }
    }
}

/// # Safety
/// As [`nt`]; blocks have `S` lines.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn nt_blocks<const S: usize>(x: &Rows, panel: &Panel, out: &mut OutMat) {
    let mut i = 0;
    // SAFETY: `i + M <= x.rows`.
    unsafe {
        while i + 8 <= x.rows {
            nt_tile::<8, S>(x, panel, out, i);
            i += 8;
        }
        while i + 4 <= x.rows {
            nt_tile::<4, S>(x, panel, out, i);
            i += 4;
        }
        while i < x.rows {
            nt_tile::<1, S>(x, panel, out, i);
            i += 1;
        }
    }
}

/// # Safety
/// As [`nt_blocks`]; rows `i..i+M` exist.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn nt_tile<const M: usize, const S: usize>(x: &Rows, panel: &Panel, out: &mut OutMat, i: usize) {
    let (lines, scales, mins) = panel.parts();
    // Loops in place of `array::from_fn`, which the compiler does not inline here.
    let mut rows = [x.row(i); M];
    for (m, row) in rows.iter_mut().enumerate() {
        *row = x.row(i + m);
    }
    let mut totals = [_mm512_setzero_ps(); M];
    // SAFETY: a panel and a row have as many blocks, each of `S` lines and `4 · S` codes; lines are aligned.
    unsafe {
        for b in 0..scales.len() {
            let mut weights = [_mm512_setzero_si512(); S];
            for (s, weights) in weights.iter_mut().enumerate() {
                *weights = _mm512_load_si512(lines.as_ptr().add(S * b + s).cast());
            }
            let scale = _mm512_load_ps(scales.as_ptr().add(b).cast());
            let min = _mm512_load_ps(mins.as_ptr().add(b).cast());
            for (total, (codes, x_scales, x_sums)) in totals.iter_mut().zip(&rows) {
                let codes = codes.as_ptr().cast::<i32>().add(S * b);
                let mut dot = _mm512_setzero_si512();
                for (s, weights) in weights.iter().enumerate() {
                    dot = _mm512_dpbusd_epi32(dot, *weights, _mm512_set1_epi32(codes.add(s).read_unaligned()));
                }
                let factor = _mm512_mul_ps(scale, _mm512_set1_ps(*x_scales.get_unchecked(b)));
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, *total);
                *total = _mm512_fmadd_ps(min, _mm512_set1_ps(*x_sums.get_unchecked(b)), *total);
            }
        }
        for (m, total) in totals.into_iter().enumerate() {
            _mm512_mask_storeu_ps(out.data.add((i + m) * out.stride), low(out.cols), total);
        }
    }
}
