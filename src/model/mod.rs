//! The frozen base: loading, the decoder, and the hook through which methods act on it.

pub mod hook;

pub mod cache;
pub mod decoder;
pub mod device;
pub mod linear;
pub mod mlp;
pub mod served;

pub mod ops;

pub mod kernels;

mod chunked;
mod config;
mod dense;
pub mod gguf;
mod guide;
mod load;
mod nf4;
mod pass;
mod quant;
mod rope;
mod taken;
mod tape;
pub mod turns;
mod weight;

pub use cache::SequenceCache;
pub use decoder::{Base, Batch, CrossEntropy, LogProbs, Scores, Sequence, Target};
pub use hook::{At, Finish, Frozen, Hook, Replaced};
pub use linear::Linear;
pub use load::Held;
pub use served::{LowRank, Served};
pub use taken::Taken;
pub use tape::{Keep, Tape};
pub use turns::Turns;
pub use weight::Compute;

use crate::formats::FormatError;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The file is sound but not a model that we can run.
    #[error("{0}")]
    Unsupported(String),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
