//! One integration binary: all of it links once.

mod model;
mod support;
mod text;
