//! One integration binary: all of it links once.

mod architecture;
mod data;
mod formats;
mod golden;
mod methods;
mod model;
mod outbound;
mod support;
mod text;
mod trainer;
