//! What several tests need.

pub mod gguf;
pub mod package;
pub mod postgres;
pub mod quantised;
pub mod server;
pub mod tiny;
pub mod training;
