//! What several tests need.

pub mod tiny;
