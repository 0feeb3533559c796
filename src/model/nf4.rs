//! NF4, the 4-bit normal float of QLoRA (Dettmers et al., arXiv 2305.14314), to the bit as bitsandbytes makes it.
//!
//! A matrix is read row by row in blocks of 64 numbers. Each block has a scale, its largest magnitude; each number is
//! the nearest of 16 codes times that scale. Codes stand two a byte, the first in the high half. With double
//! quantisation the scales lose their mean and become 8 bits themselves, in blocks of 256.
//!
//! Our block is its scale (4 bytes, or 1 with double quantisation) and its 32 bytes of codes.

use std::sync::OnceLock;

use super::kernels::{Isa, elementwise::by_isa};
use crate::formats::Storage;

pub const BLOCK: usize = 64;

/// Scales in one block of the second quantisation.
const NESTED: usize = 256;

/// Quantiles of the normal distribution, with 0 and both ends (bitsandbytes, `functional.py::get_4bit_type`).
const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Numbers in NF4.
pub struct Quantized {
    /// Two codes a byte, the first in the high half.
    pub codes: Vec<u8>,
    /// The scale of each block.
    pub absmax: Vec<f32>,
}

/// A value in the middle of two codes takes the lower one.
fn nearest(codes: &[f32], x: f32) -> u8 {
    codes.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).take_while(|middle| *middle < x).count() as u8
}

/// Any number of values; a last block may be short, and an odd last value has 0 beside it.
pub fn quantize(values: &[f32]) -> Quantized {
    let mut absmax = Vec::with_capacity(values.len().div_ceil(BLOCK));
    let mut codes = Vec::with_capacity(values.len());
    for block in values.chunks(BLOCK) {
        let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let divisor = largest.max(1e-38);
        let whole = block.len() == BLOCK;
        // bitsandbytes multiplies whole blocks and divides a short one.
        let scaled = |x: &f32| if whole { x * (1.0 / divisor) } else { x / divisor };
        codes.extend(block.iter().map(|x| nearest(&CODE, scaled(x).clamp(-1.0, 1.0))));
        absmax.push(if whole { largest } else { divisor });
    }
    let low = |pair: &[u8]| pair.get(1).copied().unwrap_or_else(|| nearest(&CODE, 0.0));
    Quantized { codes: codes.chunks(2).map(|pair| (pair[0] << 4) | low(pair)).collect(), absmax }
}

/// What the 8-bit scales of double quantisation stand for: `code[q] · scales[block / 256] + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct Nested {
    pub scales: Vec<f32>,
    pub offset: f32,
}

impl Nested {
    pub fn bytes(&self) -> usize {
        size_of_val(self.scales.as_slice()) + size_of::<f32>()
    }

    /// The largest magnitude of a block.
    pub fn largest(&self, block: usize, q: u8) -> f32 {
        dynamic_codes()[usize::from(q)] * self.scales[block / NESTED] + self.offset
    }
}

/// Scales in 8 bits, around `offset`.
pub fn quantize_scales(absmax: &[f32], offset: f32) -> (Vec<u8>, Nested) {
    let (mut codes, mut scales) = (Vec::with_capacity(absmax.len()), Vec::new());
    for block in absmax.chunks(NESTED) {
        let largest = block.iter().fold(0f32, |largest, x| largest.max((x - offset).abs()));
        // Where all are the offset, 0/0 takes the lowest code, and any times 0 is 0.
        codes.extend(block.iter().map(|x| nearest(dynamic_codes(), (x - offset) / largest)));
        scales.push(largest);
    }
    (codes, Nested { scales, offset })
}

/// The signed 8-bit dynamic map (bitsandbytes, `functional.py::create_dynamic_map`): for each of seven powers of ten,
/// the middles of 2^i equal steps from 0.1 to 1, both signs; then 0 and 1.
fn dynamic_codes() -> &'static [f32; 256] {
    static CODES: OnceLock<[f32; 256]> = OnceLock::new();
    CODES.get_or_init(|| {
        let mut codes = vec![0.0, 1.0];
        for i in 0..7 {
            let n = 1usize << i;
            let step = 0.9f32 / n as f32;
            // As torch.linspace counts: from both ends to the middle, multiplied and added in one rounding.
            let at = |j: usize| match j < n.div_ceil(2) {
                true => step.mul_add(j as f32, 0.1),
                false => (-step).mul_add((n - j) as f32, 1.0),
            };
            let power = 10f64.powi(i - 6) as f32;
            for j in 0..n {
                let middle = power * ((at(j) + at(j + 1)) / 2.0);
                codes.extend([middle, -middle]);
            }
        }
        codes.sort_by(f32::total_cmp);
        std::array::from_fn(|i| codes[i])
    })
}

/// The blocks of a matrix, and what scales their scales in NF4-DQ.
pub fn blocks(storage: Storage, rows: &[Quantized]) -> (Vec<u8>, Option<Nested>) {
    let codes = rows.iter().flat_map(|row| row.codes.chunks(BLOCK / 2));
    let absmax: Vec<f32> = rows.iter().flat_map(|row| row.absmax.iter().copied()).collect();
    match storage {
        Storage::NF4DQ => {
            let mean = absmax.iter().map(|x| f64::from(*x)).sum::<f64>() / absmax.len().max(1) as f64;
            let (scales, nested) = quantize_scales(&absmax, mean as f32);
            let bytes = scales.iter().zip(codes).flat_map(|(scale, codes)| [*scale].into_iter().chain(codes.to_vec()));
            (bytes.collect(), Some(nested))
        }
        _ => {
            let bytes =
                absmax.iter().zip(codes).flat_map(|(x, codes)| x.to_le_bytes().into_iter().chain(codes.to_vec()));
            (bytes.collect(), None)
        }
    }
}

#[inline(always)]
fn decode(codes: &[u8; 32], scale: f32, y: &mut [f32; BLOCK]) {
    for (pair, byte) in y.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
        *pair = [CODE[usize::from(byte >> 4)] * scale, CODE[usize::from(byte & 15)] * scale];
    }
}

/// One block of NF4.
#[inline(always)]
pub fn block(b: &[u8; 36], y: &mut [f32; BLOCK]) {
    let [a, b, c, d, codes @ ..] = b;
    decode(codes, f32::from_le_bytes([*a, *b, *c, *d]), y);
}

by_isa! {
    /// Blocks of NF4-DQ, of which the first is block `first` of its matrix.
    pub fn dequantize_nested(nested: &Nested, first: usize, blocks: &[u8], out: &mut [f32]) {
        for (i, (b, y)) in blocks.as_chunks::<33>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0).enumerate() {
            let [q, codes @ ..] = b;
            decode(codes, nested.largest(first + i, *q), y);
        }
    }
}

#[cfg(test)]
mod tests;
