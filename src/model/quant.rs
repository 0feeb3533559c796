//! Numbers out of stored blocks: GGML's formats, the plain ones, and NF4.
//!
//! Layouts are those of GGUF files (ggml's `block_q4_0` and so on); tests hold them against candle's own.

use half::{bf16, f16};

use super::{
    kernels::{Isa, elementwise::by_isa},
    nf4,
};
use crate::formats::Storage;

by_isa! {
    /// Writes the numbers of whole blocks. `out.len()` is the blocks' count times `storage.block_len()`.
    pub fn dequantize(storage: Storage, blocks: &[u8], out: &mut [f32]) {
        match storage {
            Storage::F32 => each(blocks, out, |b: &[u8; 4], y: &mut [f32; 1]| y[0] = f32::from_le_bytes(*b)),
            Storage::F16 => each(blocks, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = f16::from_le_bytes(*b).to_f32()),
            Storage::BF16 => each(blocks, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = bf16::from_le_bytes(*b).to_f32()),
            Storage::Q4_0 => each(blocks, out, q4_0),
            Storage::Q4_1 => each(blocks, out, q4_1),
            Storage::Q5_0 => each(blocks, out, q5_0),
            Storage::Q5_1 => each(blocks, out, q5_1),
            Storage::Q8_0 => each(blocks, out, q8_0),
            Storage::Q4K => each(blocks, out, q4_k),
            Storage::Q5K => each(blocks, out, q5_k),
            Storage::Q6K => each(blocks, out, q6_k),
            Storage::NF4 => each(blocks, out, nf4::block),
            Storage::NF4DQ => unreachable!("the scales are not in the blocks: nf4::dequantize_nested"),
        }
    }
}

#[inline(always)]
fn each<const B: usize, const N: usize>(blocks: &[u8], out: &mut [f32], f: impl Fn(&[u8; B], &mut [f32; N])) {
    for (block, y) in blocks.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        f(block, y);
    }
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[inline(always)]
fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Low nibbles are the first half of a block, high nibbles the second.
#[inline(always)]
fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for j in 0..16 {
        y[j] = (i32::from(b[2 + j] & 15) - 8) as f32 * d;
        y[j + 16] = (i32::from(b[2 + j] >> 4) - 8) as f32 * d;
    }
}

#[inline(always)]
fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for j in 0..16 {
        y[j] = i32::from(b[4 + j] & 15) as f32 * d + m;
        y[j + 16] = i32::from(b[4 + j] >> 4) as f32 * d + m;
    }
}

/// The fifth bits of the 32 numbers are one word.
#[inline(always)]
fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let (d, high) = (half_at(b, 0), word_at(b, 2));
    for j in 0..16 {
        let (low, q) = (((high >> j) & 1) << 4, ((high >> (j + 16)) & 1) << 4);
        y[j] = ((u32::from(b[6 + j] & 15) | low) as i32 - 16) as f32 * d;
        y[j + 16] = ((u32::from(b[6 + j] >> 4) | q) as i32 - 16) as f32 * d;
    }
}

#[inline(always)]
fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m, high) = (half_at(b, 0), half_at(b, 2), word_at(b, 4));
    for j in 0..16 {
        let (low, q) = (((high >> j) & 1) << 4, ((high >> (j + 16)) & 1) << 4);
        y[j] = (u32::from(b[8 + j] & 15) | low) as f32 * d + m;
        y[j + 16] = (u32::from(b[8 + j] >> 4) | q) as f32 * d + m;
    }
}

#[inline(always)]
fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for j in 0..32 {
        y[j] = f32::from(b[2 + j] as i8) * d;
    }
}

/// The 6-bit scale and minimum of sub-block `j` of a Q4_K or Q5_K block: 8 of each in 12 bytes.
#[inline(always)]
fn scale_min(j: usize, s: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}

#[inline(always)]
fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin, scales, qs) = (half_at(b, 0), half_at(b, 2), &b[4..16], &b[16..]);
    for pair in 0..4 {
        let ((s0, m0), (s1, m1)) = (scale_min(2 * pair, scales), scale_min(2 * pair + 1, scales));
        for l in 0..32 {
            let q = qs[32 * pair + l];
            y[64 * pair + l] = d * s0 * f32::from(q & 15) - dmin * m0;
            y[64 * pair + 32 + l] = d * s1 * f32::from(q >> 4) - dmin * m1;
        }
    }
}

#[inline(always)]
fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin, scales, high, qs) = (half_at(b, 0), half_at(b, 2), &b[4..16], &b[16..48], &b[48..]);
    for pair in 0..4 {
        let ((s0, m0), (s1, m1)) = (scale_min(2 * pair, scales), scale_min(2 * pair + 1, scales));
        for l in 0..32 {
            let (q, h) = (qs[32 * pair + l], high[l] >> (2 * pair));
            y[64 * pair + l] = d * s0 * f32::from((q & 15) | ((h & 1) << 4)) - dmin * m0;
            y[64 * pair + 32 + l] = d * s1 * f32::from((q >> 4) | ((h & 2) << 3)) - dmin * m1;
        }
    }
}

#[inline(always)]
fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = half_at(b, 208);
    for half in 0..2 {
        let (low, high, scales) = (&b[64 * half..], &b[128 + 32 * half..], &b[192 + 8 * half..]);
        for l in 0..32 {
            let (a, c, h) = (low[l], low[l + 32], high[l]);
            let q = [
                (a & 15) | ((h & 3) << 4),
                (c & 15) | (((h >> 2) & 3) << 4),
                (a >> 4) | (((h >> 4) & 3) << 4),
                (c >> 4) | ((h >> 6) << 4),
            ];
            for (part, q) in q.into_iter().enumerate() {
                let scale = d * f32::from(scales[l / 16 + 2 * part] as i8);
                y[128 * half + 32 * part + l] = scale * (i32::from(q) - 32) as f32;
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::{Device, quantized::GgmlDType};

    use super::*;

    /// Random blocks whose half-precision scales are small and finite.
    pub fn blocks(storage: Storage, n: usize) -> Vec<u8> {
        let mut state = 7u32;
        let mut bytes: Vec<u8> = (0..n * storage.block_bytes())
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        let halves: &[usize] = match storage {
            Storage::Q4_0 | Storage::Q5_0 | Storage::Q8_0 | Storage::F16 | Storage::BF16 => &[0],
            Storage::Q4_1 | Storage::Q5_1 | Storage::Q4K | Storage::Q5K => &[0, 2],
            Storage::Q6K => &[208],
            Storage::F32 | Storage::NF4 | Storage::NF4DQ => &[],
        };
        for (i, block) in bytes.chunks_mut(storage.block_bytes()).enumerate() {
            for at in halves {
                block[*at..at + 2].copy_from_slice(&f16::from_f32(0.01 + 0.003 * i as f32).to_le_bytes());
            }
            match storage {
                Storage::F32 => block.copy_from_slice(&(i as f32 - 3.7).to_le_bytes()),
                Storage::NF4 => block[..4].copy_from_slice(&(0.3 + 0.1 * i as f32).to_le_bytes()),
                _ => {}
            }
        }
        bytes
    }

    #[test]
    fn blocks_agree_with_candle() {
        let pairs = [
            (Storage::F32, GgmlDType::F32),
            (Storage::F16, GgmlDType::F16),
            (Storage::BF16, GgmlDType::BF16),
            (Storage::Q4_0, GgmlDType::Q4_0),
            (Storage::Q4_1, GgmlDType::Q4_1),
            (Storage::Q5_0, GgmlDType::Q5_0),
            (Storage::Q5_1, GgmlDType::Q5_1),
            (Storage::Q8_0, GgmlDType::Q8_0),
            (Storage::Q4K, GgmlDType::Q4K),
            (Storage::Q5K, GgmlDType::Q5K),
            (Storage::Q6K, GgmlDType::Q6K),
        ];
        for (storage, dtype) in pairs {
            let (n, bytes) = (6 * storage.block_len(), blocks(storage, 6));
            let theirs = candle_core::quantized::ggml_file::qtensor_from_ggml(dtype, &bytes, vec![n], &Device::Cpu);
            let theirs: Vec<f32> = theirs.unwrap().dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
            let mut ours = vec![0.0; n];
            dequantize(storage, &bytes, &mut ours);
            assert!(ours.iter().any(|x| *x != 0.0));
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "{}: {a} is not {b}", storage.name());
            }
        }
    }
}
