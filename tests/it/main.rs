//! One integration binary: all of it links once.

mod architecture;
mod formats;
mod golden;
mod methods;
mod model;
mod support;
mod text;
mod trainer;
