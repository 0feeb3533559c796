//! What several tests need.

pub mod gguf;
pub mod package;
pub mod quantised;
pub mod tiny;
pub mod training;
