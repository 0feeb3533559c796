//! What a run optimises.

pub mod supervised;
