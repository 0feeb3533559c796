//! The wire, asked by a plain HTTP client of the real binary.

mod access;
mod aliases;
mod bad_input;
mod classification;
mod embeddings;
mod estimate;
mod feedback;
mod fold;
mod format;
mod full;
mod gguf;
mod graders;
mod idempotency;
mod lists;
mod live;
mod parameters;
mod preference;
mod preferences;
mod sampling;
mod slow;
mod text;
pub mod tools;
mod uploads;
mod virtual_tokens;
mod xlora;
