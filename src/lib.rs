//! Attune: fine-tuning as a service over one resident, frozen base model.
//!
//! The modules stand in reading order: plain words first, then files and text, the model and what can be
//! trained on it, the loop, the places where things are kept, and last what users call.
//! `tests/it/architecture.rs` checks which room may use which.

pub mod domain;

pub mod formats;
pub mod text;

pub mod model;

pub mod data;

pub mod methods;
pub mod objectives;
pub mod trainer;

pub mod db;
pub mod outbound;
pub mod storage;

pub mod inference;

pub mod jobs;
pub mod service;

pub mod api;

pub mod app;
pub mod config;
pub mod database;
pub mod keys;
pub mod process;
pub mod quickstart;
pub mod telemetry;
