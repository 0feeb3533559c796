//! What several tests need.

pub mod package;
pub mod tiny;
pub mod training;
