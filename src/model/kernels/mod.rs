//! CPU kernels on f32 slices, without candle's types.
//!
//! Two products carry everything: [`nt`] (rows by rows, both along their last dimension) and [`nn`] (a row by a
//! matrix). Each output element is summed in an order that depends on the reduction's length alone, never on how many
//! rows a call has: a row's result is the same bits in any batch. The right-hand matrix may be in a narrower type
//! ([`Wide`]): the result is that of the same numbers in f32.

mod amx;
mod avx2;
mod avx512;
mod check;
mod portable;
mod wide;

pub mod bf16;
pub mod elementwise;
pub mod int8;

pub use wide::Wide;

use std::{mem::MaybeUninit, sync::OnceLock};

use rayon::prelude::*;

/// A set of instructions that the kernels are written for, the better ones behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL, and what `Avx2` has.
    Avx512,
    /// AMX with bf16 and int8 tiles, AVX-512 VNNI, and what `Avx512` has.
    Amx,
}

static CHOSEN: OnceLock<Isa> = OnceLock::new();

impl Isa {
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    fn is_here(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_here()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512.is_here() && is_x86_feature_detected!("avx512vnni") && amx::is_here(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Amx => false,
        }
    }

    /// What this machine has, best last.
    pub fn available() -> Vec<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx].into_iter().filter(|isa| isa.is_here()).collect()
    }

    /// Uses the named kernels from now on; answers what can be named if this machine lacks them, or if kernels
    /// have run already. Call it at start.
    pub fn force(name: &str) -> Result<(), String> {
        let here = Self::available();
        let names = || here.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ");
        let isa = here.iter().find(|isa| isa.name() == name);
        let isa = isa.ok_or_else(|| format!("no CPU kernels named {name:?} on this machine: it has {}", names()))?;
        if *CHOSEN.get_or_init(|| *isa) == *isa { Ok(()) } else { Err("the CPU kernels were chosen before".to_owned()) }
    }

    /// The kernels in use: unless some were forced, the best that multiply as they should: machines differ in more than
    /// was tried.
    pub fn chosen() -> Isa {
        let is_sound = |isa: &Isa| {
            let is_sound = check::is_sound(*isa);
            if !is_sound {
                tracing::warn!(
                    "the CPU kernels {} multiply wrongly on this machine: others take their place",
                    isa.name()
                );
            }
            is_sound
        };
        *CHOSEN.get_or_init(|| Self::available().into_iter().rev().find(is_sound).unwrap_or(Isa::Portable))
    }
}

/// A matrix inside a slice: rows are `stride` apart, and a row's numbers `step`, which is 1 but for a transposed matrix.
#[derive(Clone, Copy)]
pub struct Mat<'a, T = f32> {
    pub data: &'a [T],
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
    step: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Rows one behind another.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// # Panics
    /// If the last row ends behind the slice: the kernels rely on it.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(cols <= stride && (rows == 0 || (rows - 1) * stride + cols <= data.len()), "matrix outside its slice");
        Self { data, rows, cols, stride, step: 1 }
    }
}

impl Mat<'_> {
    /// Columns as rows: the left side of [`nn`] may be one, nothing else.
    pub fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, stride: self.step, step: self.stride, ..self }
    }
}

/// Where a product goes. Several may write disjoint columns of one buffer from different threads.
#[derive(Clone, Copy)]
pub struct Out {
    start: *mut f32,
    len: usize,
    stride: usize,
}

// SAFETY: an `Out` only says where to write; `part` is unsafe and asks for disjoint parts.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    pub fn new(data: &mut [f32], stride: usize) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), stride }
    }

    /// Of a buffer that nothing was written to: only for products that do not add to it.
    pub fn fresh(data: &mut [MaybeUninit<f32>], stride: usize) -> Self {
        Self { start: data.as_mut_ptr().cast(), len: data.len(), stride }
    }

    /// The matrix `rows × cols` that starts at an offset of the buffer.
    ///
    /// # Safety
    /// The buffer outlives the part, and no other part or reference in use at the same time covers an element of it.
    pub unsafe fn part(self, offset: usize, rows: usize, cols: usize) -> OutMat {
        assert!(rows == 0 || offset + (rows - 1) * self.stride + cols <= self.len, "part outside its buffer");
        // SAFETY: the offset is inside the buffer, by the assertion.
        OutMat { data: unsafe { self.start.add(offset) }, rows, cols, stride: self.stride }
    }
}

/// A buffer that is written once: without zeros before.
///
/// # Safety
/// `fill` writes every place.
pub unsafe fn filled<T: Copy>(len: usize, fill: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut data = Vec::with_capacity(len);
    fill(&mut data.spare_capacity_mut()[..len]);
    // SAFETY: by the caller.
    unsafe { data.set_len(len) };
    data
}

/// A buffer that tasks fill, each a chunk of zeros.
pub fn by_chunks(len: usize, chunk: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let chunk = chunk.max(1);
    // SAFETY: every chunk is zeros before anything else.
    unsafe {
        filled(len, |data| {
            data.par_chunks_mut(chunk).enumerate().for_each(|(t, data)| {
                data.fill(MaybeUninit::new(0.0));
                fill(t, data.assume_init_mut());
            });
        })
    }
}

/// Zeros, of large buffers by all threads.
pub fn zeros(len: usize) -> Vec<f32> {
    const CHUNK: usize = 1 << 16;
    if len < 2 * CHUNK { vec![0.0; len] } else { by_chunks(len, CHUNK, |_, _| ()) }
}

/// `a + b`, by all threads where they are long.
pub fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
    const CHUNK: usize = 1 << 14;
    assert_eq!(a.len(), b.len());
    // SAFETY: every number is written.
    unsafe {
        filled(a.len(), |data| {
            data.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK))).for_each(|(data, (a, b))| {
                data.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| _ = sum.write(a + b));
            });
        })
    }
}

/// A part of an output that one call may write.
pub struct OutMat {
    data: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl OutMat {
    pub fn of(data: &mut [f32], rows: usize, cols: usize) -> Self {
        assert!(rows * cols <= data.len(), "output too small");
        Self { data: data.as_mut_ptr(), rows, cols, stride: cols }
    }

    pub fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the row lies inside the part, which this borrows whole.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(i * self.stride), self.cols) }
    }
}

/// `out = a · bᵀ`, or `out += a · bᵀ`: `a` is `(m, k)`, `b` is `(n, k)`, `out` is `(m, n)`.
pub fn nt<T: Wide>(a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    nt_with(Isa::chosen(), a, b, out, accumulate);
}

/// `out = a · b`, or `out += a · b`: `a` is `(m, k)`, transposed or not, `b` is `(k, n)`, `out` is `(m, n)`.
pub fn nn<T: Wide>(a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    nn_with(Isa::chosen(), a, b, out, accumulate);
}

fn nt_with<T: Wide>(isa: Isa, a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    assert!(a.cols == b.cols && a.rows == out.rows && b.rows == out.cols, "shapes differ");
    assert!(a.step == 1 && b.step == 1, "transposed");
    match isa {
        Isa::Portable => portable::nt(a, b, out, accumulate),
        // SAFETY: `available` found the instructions; the shapes are checked here and in `Mat` and `Out`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::nt(a, b, out, accumulate) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512::nt(a, b, out, accumulate) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => portable::nt(a, b, out, accumulate),
    }
}

fn nn_with<T: Wide>(isa: Isa, a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    assert!(a.cols == b.rows && a.rows == out.rows && b.cols == out.cols, "shapes differ");
    assert!(b.step == 1, "transposed");
    match isa {
        Isa::Portable => portable::nn(a, b, out, accumulate),
        // SAFETY: as in `nt_with`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::nn(a, b, out, accumulate) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512::nn(a, b, out, accumulate) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => portable::nn(a, b, out, accumulate),
    }
}

/// Has what is read soon brought nearer by the memory; nothing else changes.
#[inline]
pub fn prefetch(soon: &[u8]) {
    for line in soon.chunks(64) {
        // SAFETY: every x86-64 has the instruction; it is a hint, and its address lies in the slice.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

/// `(rows, cols)` to `(cols, rows)`.
pub fn transpose(x: Mat) -> Vec<f32> {
    let mut out = vec![0.0; x.rows * x.cols];
    for (r, row) in x.data.chunks(x.stride.max(1)).take(x.rows).enumerate() {
        for (c, value) in row[..x.cols].iter().enumerate() {
            out[c * x.rows + r] = *value;
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests;
