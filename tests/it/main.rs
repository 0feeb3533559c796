//! One integration binary: all of it links once.

mod architecture;
mod model;
mod support;
mod text;
