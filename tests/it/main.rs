//! One integration binary: all of it links once.

mod api;
mod architecture;
mod data;
mod formats;
mod golden;
mod methods;
mod model;
mod openapi;
mod outbound;
mod sdk;
mod support;
mod text;
mod trainer;
