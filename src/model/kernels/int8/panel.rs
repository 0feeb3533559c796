//! Sixteen stored rows side by side: their codes as bytes, four along `k` for each row in one line, so that a register
//! holds sixteen rows and a product needs no sum across its lanes.
//!
//! Layouts of the blocks are those of GGUF files (ggml's `block_q4_0` and so on), as in `model/quant.rs`.

use super::{Isa, avx2, avx512, block_len};
use crate::formats::Storage;

/// Rows of one panel.
pub const LANES: usize = 16;

/// Four codes of each row.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Line(pub [u32; LANES]);

/// A number of each row.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Numbers(pub [f32; LANES]);

/// Where a stored row is read: the bytes of up to sixteen rows; lanes behind the last row repeat it.
pub struct Source<'a> {
    bytes: &'a [u8],
    starts: [usize; LANES],
}

/// Reused from call to call; `fill` says what it holds.
#[derive(Default)]
pub struct Panel {
    rows: usize,
    cols: usize,
    block: usize,
    /// Of a code.
    bits: u32,
    /// `cols / 4` lines.
    codes: Vec<Line>,
    /// `cols / block` each.
    scales: Vec<Numbers>,
    mins: Vec<Numbers>,
}

/// The levels of NF4 in steps of 1/112 of a block's largest, the step of 8 bits that the 16 levels are nearest to, and
/// moved to be unsigned.
pub const LEVELS: [u8; 16] = levels([-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112]);
const LEVEL_STEP: f32 = 1.0 / 112.0;

const fn levels(signed: [i16; 16]) -> [u8; 16] {
    let (mut unsigned, mut i) = ([0; 16], 0);
    while i < 16 {
        unsigned[i] = (signed[i] + 128) as u8;
        i += 1;
    }
    unsigned
}

/// Moves 16 bytes of each row so that line `i` has bytes `4i..4i+4` of every row.
pub trait Turn {
    /// # Safety
    /// `at + 16` bytes behind each start are there, and the machine has the instructions.
    unsafe fn turn(source: &Source, at: usize) -> [Line; 4];

    /// The level of each code of 4 bits.
    ///
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    unsafe fn levels(codes: Line) -> Line {
        each(codes, |w| u32::from_le_bytes(w.to_le_bytes().map(|code| LEVELS[usize::from(code & 15)])))
    }
}

struct Plain;

impl Turn for Plain {
    #[inline(always)]
    unsafe fn turn(source: &Source, at: usize) -> [Line; 4] {
        // SAFETY: by the caller.
        std::array::from_fn(|i| Line(unsafe { source.words(at + 4 * i) }))
    }
}

impl Source<'_> {
    /// # Safety
    /// What is read there lies inside the row.
    #[inline(always)]
    pub unsafe fn row(&self, lane: usize, at: usize) -> *const u8 {
        // SAFETY: by the caller.
        unsafe { self.bytes.as_ptr().add(self.starts[lane] + at) }
    }

    /// # Safety
    /// `at + N` bytes behind the row's start are there.
    #[inline(always)]
    unsafe fn bytes_at<const N: usize>(&self, lane: usize, at: usize) -> [u8; N] {
        // SAFETY: by the caller.
        unsafe { self.row(lane, at).cast::<[u8; N]>().read() }
    }

    /// # Safety
    /// As `bytes_at`, for 4 bytes of each row.
    #[inline(always)]
    unsafe fn words(&self, at: usize) -> [u32; LANES] {
        let mut words = [0; LANES];
        for (lane, word) in words.iter_mut().enumerate() {
            // SAFETY: by the caller.
            *word = u32::from_le_bytes(unsafe { self.bytes_at(lane, at) });
        }
        words
    }

    /// # Safety
    /// As `bytes_at`, for 2 bytes of each row.
    #[inline(always)]
    unsafe fn halves(&self, at: usize) -> Numbers {
        let mut numbers = [0; LANES];
        for (lane, number) in numbers.iter_mut().enumerate() {
            // SAFETY: by the caller.
            *number = u16::from_le_bytes(unsafe { self.bytes_at(lane, at) });
        }
        Numbers(numbers.map(|half| widen(half.into())))
    }

    /// Two half-precision numbers, one behind the other.
    ///
    /// # Safety
    /// As `bytes_at`, for 4 bytes of each row.
    #[inline(always)]
    unsafe fn two_halves(&self, at: usize) -> (Numbers, Numbers) {
        // SAFETY: by the caller.
        let words = unsafe { self.words(at) };
        (Numbers(words.map(|word| widen(word & 0xFFFF))), Numbers(words.map(|word| widen(word >> 16))))
    }
}

/// A half-precision number, without branches, so that sixteen of them vectorise.
#[inline(always)]
fn widen(half: u32) -> f32 {
    let (size, sign) = ((half & 0x7FFF) << 13, (half & 0x8000) << 16);
    // Exponents are moved by 112; what had the highest one is an infinity or no number.
    let value = f32::from_bits(size) * f32::from_bits(0x7780_0000);
    let special = if size >= 0x0F80_0000 { 0x7F80_0000 } else { 0 };
    f32::from_bits(value.to_bits() | special | sign)
}

#[inline(always)]
fn each(line: Line, f: impl Fn(u32) -> u32) -> Line {
    Line(line.0.map(f))
}

#[inline(always)]
fn scaled(numbers: &Numbers, factor: f32) -> Numbers {
    Numbers(numbers.0.map(|x| x * factor))
}

const NIBBLES: u32 = 0x0F0F_0F0F;

/// The four lowest bits of `bits` as the fifth bit of four codes.
#[inline(always)]
fn fifth(bits: u32) -> u32 {
    ((bits & 15).wrapping_mul(0x0020_4081) & 0x0101_0101) << 4
}

impl Panel {
    /// The most that it holds.
    pub const ROWS: usize = LANES;

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn block(&self) -> usize {
        self.block
    }

    pub(super) fn bits(&self) -> u32 {
        self.bits
    }

    pub(super) fn parts(&self) -> (&[Line], &[Numbers], &[Numbers]) {
        let blocks = self.cols / self.block;
        (&self.codes[..self.cols / 4], &self.scales[..blocks], &self.mins[..blocks])
    }

    /// Takes up to sixteen rows of `cols` numbers.
    ///
    /// # Panics
    /// If the storage has no codes, or the bytes are not those of the shape.
    pub fn fill(&mut self, storage: Storage, bytes: &[u8], rows: usize, cols: usize) {
        self.fill_with(Isa::chosen(), storage, bytes, rows, cols);
    }

    pub(super) fn fill_with(&mut self, isa: Isa, storage: Storage, bytes: &[u8], rows: usize, cols: usize) {
        let Some(block) = block_len(storage) else { panic!("{} has no codes", storage.name()) };
        let stride = cols / storage.block_len() * storage.block_bytes();
        assert!((1..=LANES).contains(&rows) && cols.is_multiple_of(storage.block_len()), "not whole blocks of 16 rows");
        assert_eq!(bytes.len(), rows * stride, "bytes do not fit the shape");
        (self.rows, self.cols, self.block, self.bits) = (rows, cols, block, bits(storage));
        if self.codes.len() < cols / 4 {
            self.codes.resize(cols / 4, Line([0; LANES]));
        }
        if self.scales.len() < cols / block {
            self.scales.resize(cols / block, Numbers([0.0; LANES]));
            self.mins.resize(cols / block, Numbers([0.0; LANES]));
        }
        let source = Source { bytes, starts: std::array::from_fn(|lane| lane.min(rows - 1) * stride) };
        match isa {
            // SAFETY: every block lies inside its row, by the assertions; `available` found the instructions.
            Isa::Portable => unsafe { self.unpack::<Plain>(storage, &source) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::unpack(self, storage, &source) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => unsafe { avx512::unpack(self, storage, &source) },
            #[cfg(not(target_arch = "x86_64"))]
            // SAFETY: as above.
            Isa::Avx2 | Isa::Avx512 | Isa::Amx => unsafe { self.unpack::<Plain>(storage, &source) },
        }
    }

    /// Sets the largest magnitudes of NF4-DQ's blocks, which are not in the blocks themselves: `largest` gives that of a
    /// row's block.
    pub fn set_largest(&mut self, largest: impl Fn(usize, usize) -> f32) {
        let (rows, halves) = (self.rows, self.cols / self.block);
        let numbers = self.scales[..halves].chunks_mut(2).zip(self.mins[..halves].chunks_mut(2));
        for (i, (scales, mins)) in numbers.enumerate() {
            let all = Numbers(std::array::from_fn(|lane| largest(lane.min(rows - 1), i)));
            spread(&all, scales, mins);
        }
    }

    /// # Safety
    /// The source's rows are whole blocks of `self.cols` numbers, and the machine has `T`'s instructions.
    #[inline(always)]
    pub(super) unsafe fn unpack<T: Turn>(&mut self, storage: Storage, source: &Source) {
        let lines = self.codes.chunks_exact_mut(storage.block_len() / 4).take(self.cols / storage.block_len());
        let per_block = storage.block_len() / self.block;
        let numbers = self.scales.chunks_exact_mut(per_block).zip(self.mins.chunks_exact_mut(per_block));
        for (i, (lines, (scales, mins))) in lines.zip(numbers).enumerate() {
            let at = i * storage.block_bytes();
            // SAFETY: the block's bytes are there, by the caller.
            unsafe {
                match storage {
                    Storage::Q4_0 => {
                        nibbles(T::turn(source, at + 2), lines);
                        scales[0] = source.halves(at);
                        mins[0] = scaled(&scales[0], -8.0);
                    }
                    Storage::Q4_1 => {
                        nibbles(T::turn(source, at + 4), lines);
                        (scales[0], mins[0]) = source.two_halves(at);
                    }
                    Storage::Q5_0 => {
                        nibbles(T::turn(source, at + 6), lines);
                        fifths(source.words(at + 2), lines);
                        scales[0] = source.halves(at);
                        mins[0] = scaled(&scales[0], -16.0);
                    }
                    Storage::Q5_1 => {
                        nibbles(T::turn(source, at + 8), lines);
                        fifths(source.words(at + 4), lines);
                        (scales[0], mins[0]) = source.two_halves(at);
                    }
                    Storage::Q8_0 => {
                        // Codes are shifted to be unsigned.
                        for (half, lines) in lines.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                            *lines = T::turn(source, at + 2 + 16 * half).map(|line| each(line, |w| w ^ 0x8080_8080));
                        }
                        scales[0] = source.halves(at);
                        mins[0] = scaled(&scales[0], -128.0);
                    }
                    Storage::Q4K => {
                        sub_scales(source, at, scales, mins);
                        pairs::<T>(source, at + 16, lines);
                    }
                    Storage::Q5K => {
                        sub_scales(source, at, scales, mins);
                        pairs::<T>(source, at + 48, lines);
                        fifths_k::<T>(source, at + 16, lines);
                    }
                    Storage::Q6K => six::<T>(source, at, lines, scales, mins),
                    Storage::NF4 => {
                        normal::<T>(source, at + 4, lines);
                        let largest = Numbers(source.words(at).map(f32::from_bits));
                        spread(&largest, scales, mins);
                    }
                    Storage::NF4DQ => normal::<T>(source, at + 1, lines),
                    Storage::F32 | Storage::F16 | Storage::BF16 => {}
                }
            }
        }
    }
}

/// Of a code here: NF4's are those of its levels.
fn bits(storage: Storage) -> u32 {
    match storage {
        Storage::Q4_0 | Storage::Q4_1 | Storage::Q4K => 4,
        Storage::Q5_0 | Storage::Q5_1 | Storage::Q5K => 5,
        Storage::Q6K => 6,
        Storage::Q8_0 | Storage::NF4 | Storage::NF4DQ | Storage::F32 | Storage::F16 | Storage::BF16 => 8,
    }
}

/// NF4: 32 bytes hold 64 codes in order, the first of two in the high nibble.
///
/// # Safety
/// As [`Turn::turn`], for 32 bytes.
#[inline(always)]
unsafe fn normal<T: Turn>(source: &Source, at: usize, lines: &mut [Line]) {
    for (half, lines) in lines.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        // SAFETY: by the caller.
        let words = unsafe { T::turn(source, at + 16 * half) };
        for (i, word) in words.into_iter().enumerate() {
            // Two bytes become four codes.
            let four = |pair: u32| {
                let apart = (pair & 0xFF) | ((pair & 0xFF00) << 8);
                ((apart >> 4) & 0x000F_000F) | ((apart & 0x000F_000F) << 8)
            };
            // SAFETY: by the caller.
            unsafe {
                lines[2 * i] = T::levels(each(word, |w| four(w & 0xFFFF)));
                lines[2 * i + 1] = T::levels(each(word, |w| four(w >> 16)));
            }
        }
    }
}

/// The scales and minima of the two halves of an NF4 block, of its largest magnitude.
#[inline(always)]
fn spread(largest: &Numbers, scales: &mut [Numbers], mins: &mut [Numbers]) {
    scales.fill(scaled(largest, LEVEL_STEP));
    mins.fill(scaled(largest, -128.0 * LEVEL_STEP));
}

/// Low nibbles are the first half of a block, high nibbles the second.
#[inline(always)]
fn nibbles(words: [Line; 4], lines: &mut [Line]) {
    for (i, word) in words.into_iter().enumerate() {
        lines[i] = each(word, |w| w & NIBBLES);
        lines[4 + i] = each(word, |w| (w >> 4) & NIBBLES);
    }
}

#[inline(always)]
fn fifths(high: [u32; LANES], lines: &mut [Line]) {
    for (i, line) in lines.iter_mut().enumerate().take(8) {
        for (word, high) in line.0.iter_mut().zip(high) {
            *word |= fifth(high >> (4 * i));
        }
    }
}

/// Q4_K and Q5_K: 32 bytes hold the low nibbles of one sub-block and the high ones of the next.
///
/// # Safety
/// As [`Turn::turn`], for 128 bytes.
#[inline(always)]
unsafe fn pairs<T: Turn>(source: &Source, at: usize, lines: &mut [Line]) {
    for (pair, lines) in lines.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        for half in 0..2 {
            // SAFETY: by the caller.
            let words = unsafe { T::turn(source, at + 32 * pair + 16 * half) };
            for (i, word) in words.into_iter().enumerate() {
                lines[4 * half + i] = each(word, |w| w & NIBBLES);
                lines[8 + 4 * half + i] = each(word, |w| (w >> 4) & NIBBLES);
            }
        }
    }
}

/// Q5_K: bit `j` of 32 bytes is the fifth bit of sub-block `j`.
///
/// # Safety
/// As [`Turn::turn`], for 32 bytes.
#[inline(always)]
unsafe fn fifths_k<T: Turn>(source: &Source, at: usize, lines: &mut [Line]) {
    for half in 0..2 {
        // SAFETY: by the caller.
        let high = unsafe { T::turn(source, at + 16 * half) };
        for (j, lines) in lines.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            for (line, high) in lines[4 * half..].iter_mut().zip(&high) {
                for (word, high) in line.0.iter_mut().zip(high.0) {
                    *word |= ((high >> j) & 0x0101_0101) << 4;
                }
            }
        }
    }
}

/// The 6-bit scales and minima of a Q4_K or Q5_K block: 8 of each in 12 bytes, as ggml packs them.
///
/// # Safety
/// The block's bytes are there.
#[inline(always)]
unsafe fn sub_scales(source: &Source, at: usize, scales: &mut [Numbers], mins: &mut [Numbers]) {
    // SAFETY: by the caller.
    let (d, least) = unsafe { source.two_halves(at) };
    // SAFETY: as above.
    let (a, b, c) = unsafe { (source.words(at + 4), source.words(at + 8), source.words(at + 12)) };
    for j in 0..8 {
        let shift = 8 * (j % 4) as u32;
        for lane in 0..LANES {
            let (a, b, c) = (a[lane] >> shift, b[lane] >> shift, c[lane] >> shift);
            let (scale, min) = if j < 4 {
                (a & 63, b & 63)
            } else {
                ((c & 15) | (((a >> 6) & 3) << 4), ((c >> 4) & 15) | (((b >> 6) & 3) << 4))
            };
            scales[j].0[lane] = d.0[lane] * scale as f32;
            mins[j].0[lane] = -least.0[lane] * min as f32;
        }
    }
}

/// Q6_K: four low bits in 128 bytes, two high bits in 64, and a scale for each 16 codes.
///
/// # Safety
/// As [`Turn::turn`], for the 210 bytes of the block.
#[inline(always)]
unsafe fn six<T: Turn>(source: &Source, at: usize, lines: &mut [Line], scales: &mut [Numbers], mins: &mut [Numbers]) {
    // SAFETY: by the caller.
    let d = unsafe { source.halves(at + 208) };
    for (n, (scale, min)) in scales.iter_mut().zip(mins).enumerate() {
        for (lane, (scale, min)) in scale.0.iter_mut().zip(&mut min.0).enumerate() {
            // SAFETY: by the caller.
            let [own] = unsafe { source.bytes_at(lane, at + 192 + n) };
            *scale = d.0[lane] * f32::from(own as i8);
            *min = *scale * -32.0;
        }
    }
    for (half, lines) in lines.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for sixteen in 0..2 {
            // SAFETY: by the caller.
            let (low, other, high) = unsafe {
                let low = at + 64 * half + 16 * sixteen;
                (T::turn(source, low), T::turn(source, low + 32), T::turn(source, at + 128 + 32 * half + 16 * sixteen))
            };
            for i in 0..4 {
                for (part, low) in [low[i], other[i], low[i], other[i]].into_iter().enumerate() {
                    let line = &mut lines[8 * part + 4 * sixteen + i];
                    for ((word, low), high) in line.0.iter_mut().zip(low.0).zip(high[i].0) {
                        let low = if part < 2 { low } else { low >> 4 };
                        *word = (low & NIBBLES) | (((high >> (2 * part)) & 0x0303_0303) << 4);
                    }
                }
            }
        }
    }
}
