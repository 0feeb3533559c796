//! What several tests need.

pub mod gguf;
pub mod package;
pub mod tiny;
