//! What several tests need.

pub mod chaotic;
pub mod counting;
pub mod elsewhere;
pub mod faulty;
pub mod gguf;
pub mod package;
pub mod postgres;
pub mod quantised;
pub mod s3;
pub mod server;
pub mod stage;
pub mod store;
pub mod tiny;
pub mod training;
