//! The wire, asked by a plain HTTP client of the real binary.

mod access;
mod bad_input;
mod embeddings;
mod feedback;
mod format;
mod idempotency;
mod lists;
mod sampling;
mod text;
mod tools;
mod uploads;
