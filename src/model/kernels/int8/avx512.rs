//! The int8 product with AVX-512 VNNI: a register holds four codes of sixteen rows of weights, and is multiplied by
//! four codes of a row, broadcast from memory.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::{
    super::{
        OutMat,
        avx512::{low, turn},
    },
    Rows,
    panel::{LEVELS, Line, Panel, Source, Turn},
};
use crate::formats::Storage;

struct Shuffles;

impl Turn for Shuffles {
    #[inline(always)]
    unsafe fn turn(source: &Source, at: usize) -> [Line; 4] {
        // SAFETY: 16 bytes of each row are there, and the instructions, by the caller.
        unsafe { turn(|lane| source.row(lane, at)).map(|line| std::mem::transmute::<__m512i, Line>(line)) }
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

/// The product for the rows from `start` on.
///
/// # Safety
/// The machine has AVX-512 F and VNNI; the shapes match.
#[target_feature(enable = "avx512f,avx512vnni")]
pub unsafe fn nt(x: &Rows, panel: &Panel, out: &mut OutMat, start: usize) {
    // SAFETY: by the caller.
    unsafe {
        match panel.block() {
            16 => nt_blocks::<4>(x, panel, out, start),
            _ => nt_blocks::<8>(x, panel, out, start),
        }
    }
}

/// # Safety
/// As [`nt`]; blocks have `S` lines.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn nt_blocks<const S: usize>(x: &Rows, panel: &Panel, out: &mut OutMat, start: usize) {
    let mut i = start;
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
                let (x_scale, x_sum) = (*x_scales.get_unchecked(b), *x_sums.get_unchecked(b));
                *total = add_block(*total, dot, [scale, min], x_scale, x_sum);
            }
        }
        for (m, total) in totals.into_iter().enumerate() {
            _mm512_mask_storeu_ps(out.data.add((i + m) * out.stride), low(out.cols), total);
        }
    }
}

/// What a block adds to the sums of a row with sixteen rows of weights.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add_block(total: __m512, dot: __m512i, [scale, min]: [__m512; 2], x_scale: f32, x_sum: f32) -> __m512 {
    let total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, _mm512_set1_ps(x_scale)), total);
    _mm512_fmadd_ps(min, _mm512_set1_ps(x_sum), total)
}
