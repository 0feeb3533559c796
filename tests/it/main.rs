//! One integration binary: all of it links once.

mod api;
mod architecture;
mod data;
mod formats;
mod model;
mod openapi;
mod outbound;
mod sdk;
mod support;
mod text;
