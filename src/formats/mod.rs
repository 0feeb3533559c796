//! Containers from outside, checked before anything trusts them. No tensors, no network.

pub mod archive;
mod bytes;
pub mod gguf;
pub mod safetensors;

use std::path::Path;

use half::{bf16, f16};

/// A container that cannot be used, and where it is wrong.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("{0}")]
    Invalid(String),
    /// Weights as a pickle: refused whatever they hold, since reading them runs code.
    #[error("{0}")]
    Pickle(String),
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
}

impl FormatError {
    /// Says which file is meant.
    fn in_file(self, path: &Path) -> Self {
        match self {
            FormatError::Invalid(what) => FormatError::Invalid(format!("{}: {what}", path.display())),
            other => other,
        }
    }
}

/// How the numbers of a stored tensor are written: GGML's block formats, the plain ones, and NF4 made at load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    /// 4-bit normal floats (arXiv 2305.14314): a scale and 32 bytes of two numbers each.
    NF4,
    /// The same with its scales in 8 bits; what scales those stands outside the blocks.
    NF4DQ,
}

impl Storage {
    /// Numbers in one block.
    pub fn block_len(self) -> usize {
        match self {
            Storage::F32 | Storage::F16 | Storage::BF16 => 1,
            Storage::Q4_0 | Storage::Q4_1 | Storage::Q5_0 | Storage::Q5_1 | Storage::Q8_0 => 32,
            Storage::NF4 | Storage::NF4DQ => 64,
            Storage::Q4K | Storage::Q5K | Storage::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Storage::F32 => 4,
            Storage::F16 | Storage::BF16 => 2,
            Storage::Q4_0 => 18,
            Storage::Q4_1 => 20,
            Storage::Q5_0 => 22,
            Storage::Q5_1 => 24,
            Storage::Q8_0 => 34,
            Storage::Q4K => 144,
            Storage::Q5K => 176,
            Storage::Q6K => 210,
            Storage::NF4 => 36,
            Storage::NF4DQ => 33,
        }
    }

    /// The name in GGUF tools, `Q4_1` or `Q4_K`; bitsandbytes' for NF4.
    pub fn name(self) -> &'static str {
        match self {
            Storage::F32 => "F32",
            Storage::F16 => "F16",
            Storage::BF16 => "BF16",
            Storage::Q4_0 => "Q4_0",
            Storage::Q4_1 => "Q4_1",
            Storage::Q5_0 => "Q5_0",
            Storage::Q5_1 => "Q5_1",
            Storage::Q8_0 => "Q8_0",
            Storage::Q4K => "Q4_K",
            Storage::Q5K => "Q5_K",
            Storage::Q6K => "Q6_K",
            Storage::NF4 => "NF4",
            Storage::NF4DQ => "NF4-DQ",
        }
    }
}

/// One stored tensor: a view into a mapped file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Outermost first: `[out, in]` for a linear (GGUF's own order is the reverse).
    pub shape: &'a [usize],
    pub storage: Storage,
    pub data: &'a [u8],
}

impl TensorView<'_> {
    /// The numbers of a tensor that is stored plainly (F32, F16, BF16).
    pub fn to_f32(&self) -> Result<Vec<f32>, FormatError> {
        let halves = |widen: fn([u8; 2]) -> f32| self.data.as_chunks().0.iter().map(|b| widen(*b)).collect();
        Ok(match self.storage {
            Storage::F32 => self.data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Storage::F16 => halves(|b| f16::from_le_bytes(b).to_f32()),
            Storage::BF16 => halves(|b| bf16::from_le_bytes(b).to_f32()),
            other => {
                return Err(FormatError::Invalid(format!("{} is not a plain number format", other.name())));
            }
        })
    }
}
