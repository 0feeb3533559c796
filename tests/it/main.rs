//! One integration binary: all of it links once.

mod api;
mod architecture;
mod formats;
mod model;
mod openapi;
mod sdk;
mod support;
mod text;
