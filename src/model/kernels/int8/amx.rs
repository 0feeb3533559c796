//! The int8 product with AMX: a tile of sixteen rows by the sixteen rows of weights of a panel, whose lines are laid out
//! as the instruction reads them.
//!
//! Each block has scales of its own, so that a tile is summed over one block only and goes through memory to be scaled.
//! That costs four vector instructions a row and block, what the AVX-512 kernel does too, but that one needs eight more
//! for the sums (four in blocks of 16). Four blocks are summed at a time, so that one need not wait for the other.
//! Sums in a block are exact and scaled by the same steps in the same order: AVX-512 gives the same bits, and takes the
//! rows that fill no tile.

#![cfg(target_arch = "x86_64")]

use std::arch::{asm, x86_64::*};

use super::{
    super::{
        OutMat,
        amx::{SIDE, Tiles},
        avx512::low,
    },
    Rows,
    avx512::{self, add_block},
    panel::Panel,
};

/// Blocks that are summed at a time.
const BLOCKS: usize = 4;

/// A block's sums: of each row with sixteen rows of weights.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Sums([[i32; SIDE]; SIDE]);

/// # Safety
/// The machine has the instructions of `Isa::Amx`; the shapes match.
#[target_feature(enable = "avx512f,avx512vnni")]
pub unsafe fn nt(x: &Rows, panel: &Panel, out: &mut OutMat) {
    let whole = x.rows / SIDE * SIDE;
    // SAFETY: by the caller; nothing called here uses tiles.
    unsafe {
        if whole > 0 {
            let mut tiles = Tiles::new();
            let (sums, bytes) = ((SIDE, 4 * SIDE), panel.block());
            // Two blocks' rows and weights take turns in the tiles 4 to 7.
            let (rows, weights) = ((SIDE, bytes), (bytes / 4, 4 * SIDE));
            tiles.shape([sums, sums, sums, sums, rows, rows, weights, weights]);
            for i in (0..whole).step_by(SIDE) {
                match panel.block() {
                    16 => nt_tile::<4>(x, panel, out, i),
                    _ => nt_tile::<8>(x, panel, out, i),
                }
            }
        }
        avx512::nt(x, panel, out, whole);
    }
}

/// # Safety
/// As [`nt`]; blocks have `S` lines, tiles their shapes, and rows `i..i+16` exist.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn nt_tile<const S: usize>(x: &Rows, panel: &Panel, out: &mut OutMat, i: usize) {
    let (lines, scales, mins) = panel.parts();
    let blocks = scales.len();
    let (codes, start) = (&x.codes[i * x.cols..], i * blocks);
    let mut sums = [Sums([[0; SIDE]; SIDE]); BLOCKS];
    let mut totals = [_mm512_setzero_ps(); SIDE];
    let mut b = 0;
    // SAFETY: a panel and a row have as many blocks, each of `S` lines and `4 · S` codes; lines are aligned.
    unsafe {
        while b < blocks {
            let (codes, weights) = (codes.as_ptr().add(4 * S * b).cast(), lines.as_ptr().add(S * b).cast());
            let count = if b + BLOCKS <= blocks {
                multiply::<S, 1>(codes, x.cols, weights, &mut sums);
                BLOCKS
            } else {
                multiply::<S, 0>(codes, x.cols, weights, &mut sums);
                1
            };
            for (b, sums) in (b..b + count).zip(&sums) {
                let of_panel = [scales, mins].map(|numbers| _mm512_load_ps(numbers.as_ptr().add(b).cast()));
                for (m, (total, dots)) in totals.iter_mut().zip(&sums.0).enumerate() {
                    let at = start + m * blocks + b;
                    let dots = _mm512_load_si512(dots.as_ptr().cast());
                    *total = add_block(*total, dots, of_panel, *x.scales.get_unchecked(at), *x.sums.get_unchecked(at));
                }
            }
            b += count;
        }
        for (m, total) in totals.into_iter().enumerate() {
            _mm512_mask_storeu_ps(out.data.add((i + m) * out.stride), low(out.cols), total);
        }
    }
}

/// The sums of four blocks if `FOUR` is 1, else of one: codes of rows `stride` apart are signed, those of weights are
/// not.
///
/// # Safety
/// The tiles have their shapes, for blocks of `S` lines; so many blocks of sixteen rows and of lines are there.
#[inline]
unsafe fn multiply<const S: usize, const FOUR: usize>(
    codes: *const u8,
    stride: usize,
    weights: *const u8,
    sums: &mut [Sums; BLOCKS],
) {
    // SAFETY: by the caller.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm4, [{codes} + {stride} * 1]",
            "tileloadd tmm6, [{weights} + {line} * 1]",
            "tdpbsud tmm0, tmm4, tmm6",
            ".if {FOUR}",
            "tilezero tmm1",
            "tileloadd tmm5, [{codes} + {stride} * 1 + 4 * {S}]",
            "tileloadd tmm7, [{weights} + {line} * 1 + 64 * {S}]",
            "tdpbsud tmm1, tmm5, tmm7",
            "tilezero tmm2",
            "tileloadd tmm4, [{codes} + {stride} * 1 + 8 * {S}]",
            "tileloadd tmm6, [{weights} + {line} * 1 + 128 * {S}]",
            "tdpbsud tmm2, tmm4, tmm6",
            "tilezero tmm3",
            "tileloadd tmm5, [{codes} + {stride} * 1 + 12 * {S}]",
            "tileloadd tmm7, [{weights} + {line} * 1 + 192 * {S}]",
            "tdpbsud tmm3, tmm5, tmm7",
            ".endif",
            "tilestored [{sums} + {line} * 1], tmm0",
            ".if {FOUR}",
            "tilestored [{sums} + {line} * 1 + 1024], tmm1",
            "tilestored [{sums} + {line} * 1 + 2048], tmm2",
            "tilestored [{sums} + {line} * 1 + 3072], tmm3",
            ".endif",
            FOUR = const FOUR,
            S = const S,
            codes = in(reg) codes,
            stride = in(reg) stride,
            weights = in(reg) weights,
            line = in(reg) 4 * SIDE,
            sums = in(reg) sums,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        );
    }
}
