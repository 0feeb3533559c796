//! One integration binary: all of it links once.

mod architecture;
mod data;
mod formats;
mod model;
mod outbound;
mod support;
mod text;
