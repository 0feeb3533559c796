//! bf16 products with AMX: a tile is a register of 16 rows of 64 bytes, and one instruction adds the product of two
//! tiles to a third. Tiles have shapes, so that ends of rows and columns need no masks.
//!
//! Stable Rust has no AMX intrinsics, and the compiler knows nothing of tiles: a block of assembly loads all that it
//! multiplies and stores all that it sums; only the shapes outlive it, until [`Tiles`] is dropped.
//!
//! The instruction sums pairs of 16 steps by even and by odd numbers, and adds both to the tile: an order of its own,
//! unlike the one of AVX-512's bf16 product. So every bf16 product comes here, also of one row: which kernel a row takes
//! must not depend on what stands beside it. Sixteen pairs make a step; what is left of the reduction is a step of its
//! own with a smaller shape, whose sums begin with the stored ones.

#![cfg(target_arch = "x86_64")]

use std::{
    arch::{asm, x86_64::*},
    cell::RefCell,
    marker::PhantomData,
    sync::OnceLock,
};

use half::bf16;

use super::{
    Mat, OutMat,
    avx512::turn,
    bf16::{LINE, Line, Pair},
};

/// Rows of a tile, words of one of its rows.
pub(super) use super::bf16::SIDE;

/// Whether the machine has tiles, with bf16 and int8 products, and the kernel lets this process use them, which it has
/// to be asked for once. The machine has AVX-512.
pub fn is_here() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| has_instructions() && is_permitted())
}

fn has_instructions() -> bool {
    const BF16_TILES_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const SHAPES_AND_TILES: u64 = 1 << 17 | 1 << 18;
    let found = __cpuid_count(7, 0).edx & BF16_TILES_INT8;
    // SAFETY: who has AVX-512 has XSAVE, and the kernel has enabled it.
    found == BF16_TILES_INT8 && unsafe { _xgetbv(0) } & SHAPES_AND_TILES == SHAPES_AND_TILES
}

#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILES: libc::c_long = 18;
    // SAFETY: takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILES) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Rows of each tile, and bytes of its rows; a tile that is not used has none.
pub type Shapes = [(usize, usize); 8];

/// This thread's tiles. Dropped, they are free again, and the kernel need not save them.
pub struct Tiles {
    shapes: Shapes,
    here: PhantomData<*const ()>,
}

/// What LDTILECFG reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// # Safety
    /// [`is_here`], and nobody else on this thread has tiles.
    pub unsafe fn new() -> Self {
        Self { shapes: [(0, 0); 8], here: PhantomData }
    }

    /// Gives the tiles these shapes.
    ///
    /// # Panics
    /// If one has more than 16 rows or 64 bytes a row.
    pub fn shape(&mut self, shapes: Shapes) {
        if self.shapes == shapes {
            return;
        }
        let mut config = Config { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, bytes)) in shapes.into_iter().enumerate() {
            assert!(rows <= SIDE && bytes <= 4 * SIDE && (rows == 0) == (bytes == 0), "no shape of a tile");
            (config.rows[i], config.row_bytes[i]) = (rows as u8, bytes as u16);
        }
        // SAFETY: the machine has tiles; reads 64 bytes, which say what it accepts.
        unsafe {
            asm!(
                "ldtilecfg [{}]", in(reg) &config, options(nostack, preserves_flags, readonly),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            );
        }
        self.shapes = shapes;
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the machine has tiles, and nothing is kept in them.
        unsafe {
            asm!(
                "tilerelease", options(nostack, preserves_flags, nomem),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            );
        }
    }
}

/// Bytes of a tile.
const TILE: usize = SIDE * 4 * SIDE;

/// The left side as tiles of sixteen rows by sixteen pairs, a tile's rows one behind another: those of the same rows
/// follow each other, and the next sixteen rows begin `next` bytes behind.
#[derive(Clone, Copy)]
struct Left {
    data: *const u8,
    next: usize,
}

/// The right side: lines of sixteen columns, a pair of each, `stride` pairs apart; the next sixteen columns begin
/// `next` pairs behind.
#[derive(Clone, Copy)]
struct Right {
    data: *const Pair,
    stride: usize,
    next: usize,
}

thread_local! {
    static LINES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Of the left side's columns those from one on.
///
/// # Safety
/// [`is_here`]; the left side is tiled rows of `cols` numbers, as many as `out` has; `from` is a multiple of 32, and `b`
/// has as many pairs of rows as columns follow, or fewer.
pub unsafe fn nn(a: &[Line], cols: usize, from: usize, b: Mat<Pair>, out: &mut OutMat, add: bool) {
    let (left, right) = (left(a, cols, from), Right { data: b.data.as_ptr(), stride: b.stride, next: SIDE });
    // SAFETY: the sides lie inside their slices; the rest by the caller.
    unsafe { product(left, right, b.rows, out, add) }
}

/// Lays the right side out in pairs first: with few rows on the left that costs more than the product, but less than it
/// cost to make the numbers, and one order of sums serves for all.
///
/// # Safety
/// [`is_here`]; the left side is tiled rows as long as those of `b`, as many as `out` has.
pub unsafe fn nt(a: &[Line], b: Mat<bf16>, out: &mut OutMat, add: bool) {
    let pairs = b.cols.div_ceil(2);
    LINES.with_borrow_mut(|lines| {
        let len = b.rows.div_ceil(SIDE) * pairs;
        if lines.len() < len {
            lines.resize(len, Line::ZERO);
        }
        for (t, lines) in lines[..len].chunks_mut(pairs.max(1)).enumerate() {
            // SAFETY: `SIDE · t < b.rows`; the instructions are there.
            unsafe { lay(b, SIDE * t, lines) };
        }
        let right = Right { data: lines.as_ptr().cast(), stride: SIDE, next: SIDE * pairs };
        // SAFETY: the sides lie inside their buffers; the rest by the caller.
        unsafe { product(left(a, b.cols, 0), right, pairs, out, add) }
    });
}

fn left(lines: &[Line], cols: usize, from: usize) -> Left {
    let tiles = cols.div_ceil(LINE);
    Left { data: lines[(from / LINE * SIDE).min(lines.len())..].as_ptr().cast(), next: tiles * TILE }
}

/// Sixteen rows from row `j` on as lines of pairs; lanes behind the last row repeat it, and nobody reads them.
///
/// # Safety
/// The machine has AVX-512 F; the row `j` exists, and there is a line for each of a row's pairs.
#[target_feature(enable = "avx512f")]
unsafe fn lay(b: Mat<bf16>, j: usize, lines: &mut [Line]) {
    let row = |lane: usize| &b.data[(j + lane).min(b.rows - 1) * b.stride..][..b.cols];
    let mut rows = [row(0); SIDE];
    for (lane, place) in rows.iter_mut().enumerate() {
        *place = row(lane);
    }
    let (fours, rest) = lines[..b.cols.div_ceil(2)].split_at_mut(b.cols / 8 * 4);
    for (i, four) in fours.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // SAFETY: `8i + 8 <= b.cols`; a line is 64 plain bytes.
        *four = unsafe { turn(|lane| rows[lane].as_ptr().add(8 * i).cast()).map(|x| std::mem::transmute(x)) };
    }
    for (i, line) in rest.iter_mut().enumerate() {
        let at = b.cols / 8 * 8 + 2 * i;
        for (pair, row) in line.0.as_chunks_mut::<2>().0.iter_mut().zip(&rows) {
            *pair = [row[at], row.get(at + 1).copied().unwrap_or(bf16::ZERO)];
        }
    }
}

/// # Safety
/// [`is_here`]; both sides have so many pairs; `out` has the rows of the left and the columns of the right.
unsafe fn product(left: Left, right: Right, pairs: usize, out: &mut OutMat, add: bool) {
    if pairs == 0 && !add {
        (0..out.rows).for_each(|i| out.row(i).fill(0.0));
    }
    let (whole, rest) = (pairs / SIDE, pairs % SIDE);
    // SAFETY: by the caller; nothing called below uses tiles.
    unsafe {
        let mut tiles = Tiles::new();
        if whole > 0 {
            pass(&mut tiles, left, right, out, SIDE, whole, add);
        }
        if rest > 0 {
            let right = Right { data: right.data.add(SIDE * whole * right.stride), ..right };
            let left = Left { data: left.data.add(TILE * whole), ..left };
            pass(&mut tiles, left, right, out, rest, 1, add || whole > 0);
        }
    }
}

/// Some steps of `depth` pairs, for all rows and columns.
///
/// # Safety
/// As [`product`], for these steps.
unsafe fn pass(tiles: &mut Tiles, left: Left, right: Right, out: &mut OutMat, depth: usize, steps: usize, add: bool) {
    for i in (0..out.rows).step_by(2 * SIDE) {
        let (m, more_rows) = halves(out.rows - i);
        for j in (0..out.cols).step_by(2 * SIDE) {
            let (n, more_cols) = halves(out.cols - j);
            let used = |rows: usize, words: usize| if rows.min(words) == 0 { (0, 0) } else { (rows, 4 * words) };
            tiles.shape([
                used(m, n),
                used(m, more_cols),
                used(more_rows, n),
                used(more_rows, more_cols),
                used(m, depth),
                used(more_rows, depth),
                used(depth, n),
                used(depth, more_cols),
            ]);
            // SAFETY: rows and columns of the block exist, and the tiles have its shapes; what lies behind the last row
            // or column is not touched, so that its address may be any.
            unsafe {
                let a = left.data.add(i / SIDE * left.next);
                let b = right.data.add(j / SIDE * right.next);
                let block = Block {
                    a: [a, a.wrapping_add(left.next)],
                    b: [b.cast(), b.wrapping_add(right.next).cast()],
                    b_stride: 4 * right.stride,
                    steps,
                    out: out.data.add(i * out.stride + j),
                    out_stride: out.stride,
                    add,
                };
                if !add {
                    block.claim(m + more_rows, n + more_cols);
                }
                match (more_rows > 0, more_cols > 0) {
                    (false, false) => block.product::<0, 0>(),
                    (false, true) => block.product::<0, 1>(),
                    (true, false) => block.product::<1, 0>(),
                    (true, true) => block.product::<1, 1>(),
                }
            }
        }
    }
}

/// Of `n`, what the first tile of two takes, and what the second.
fn halves(n: usize) -> (usize, usize) {
    (n.min(SIDE), n.saturating_sub(SIDE).min(SIDE))
}

/// Up to two tiles of rows and two of columns: strides in bytes, but the output's in numbers.
struct Block {
    a: [*const u8; 2],
    b: [*const u8; 2],
    b_stride: usize,
    steps: usize,
    out: *mut f32,
    out_stride: usize,
    add: bool,
}

impl Block {
    /// Has the output's lines brought while the sums are made: they are written at once then.
    ///
    /// # Safety
    /// The rows and columns exist.
    unsafe fn claim(&self, rows: usize, cols: usize) {
        for i in 0..rows {
            // SAFETY: the row exists; a hint.
            unsafe {
                let row = self.out.add(i * self.out_stride);
                asm!("prefetchw [{0}]", "prefetchw [{1}]", in(reg) row, in(reg) row.add(cols - 1),
                     options(nostack, preserves_flags, readonly));
            }
        }
    }

    /// Tiles 0 to 3 are the sums, 4 and 5 the rows, 6 and 7 the columns; the second ones are there if the parameters
    /// are 1.
    ///
    /// # Safety
    /// The tiles have the block's shapes, which lie inside the matrices; there is a step.
    unsafe fn product<const ROWS: usize, const COLS: usize>(&self) {
        // SAFETY: by the caller.
        unsafe {
            asm!(
                "test {add:e}, {add:e}",
                "jnz 2f",
                "tilezero tmm0",
                ".if {COLS}", "tilezero tmm1", ".endif",
                ".if {ROWS}", "tilezero tmm2", ".endif",
                ".if {ROWS} & {COLS}", "tilezero tmm3", ".endif",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{out0} + {out_stride} * 1]",
                ".if {COLS}", "tileloadd tmm1, [{out0} + {out_stride} * 1 + 64]", ".endif",
                ".if {ROWS}", "tileloadd tmm2, [{out1} + {out_stride} * 1]", ".endif",
                ".if {ROWS} & {COLS}", "tileloadd tmm3, [{out1} + {out_stride} * 1 + 64]", ".endif",
                "3:",
                "tileloadd tmm4, [{a0} + {line} * 1]",
                "tileloadd tmm6, [{b0} + {b_stride} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                ".if {COLS}", "tileloadd tmm7, [{b1} + {b_stride} * 1]", "tdpbf16ps tmm1, tmm4, tmm7", ".endif",
                ".if {ROWS}", "tileloadd tmm5, [{a1} + {line} * 1]", "tdpbf16ps tmm2, tmm5, tmm6", ".endif",
                ".if {ROWS} & {COLS}", "tdpbf16ps tmm3, tmm5, tmm7", ".endif",
                "add {a0}, {tile}",
                "add {a1}, {tile}",
                "add {b0}, {b_step}",
                "add {b1}, {b_step}",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{out0} + {out_stride} * 1], tmm0",
                ".if {COLS}", "tilestored [{out0} + {out_stride} * 1 + 64], tmm1", ".endif",
                ".if {ROWS}", "tilestored [{out1} + {out_stride} * 1], tmm2", ".endif",
                ".if {ROWS} & {COLS}", "tilestored [{out1} + {out_stride} * 1 + 64], tmm3", ".endif",
                ROWS = const ROWS,
                COLS = const COLS,
                a0 = inout(reg) self.a[0] => _,
                a1 = inout(reg) self.a[1] => _,
                line = in(reg) 4 * SIDE,
                tile = const TILE,
                b0 = inout(reg) self.b[0] => _,
                b1 = inout(reg) self.b[1] => _,
                b_stride = in(reg) self.b_stride,
                b_step = in(reg) SIDE * self.b_stride,
                steps = inout(reg) self.steps => _,
                out0 = in(reg) self.out,
                out1 = in(reg) self.out.wrapping_add(SIDE * self.out_stride),
                out_stride = in(reg) 4 * self.out_stride,
                add = in(reg) u32::from(self.add),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
