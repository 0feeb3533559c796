//! What a handler asks for: requests checked against bases and files, names resolved, text generated, adapters moved
//! in and out. No HTTP.

pub mod adapters;
mod advice;
mod aliases;
mod batches;
pub mod catalogue;
pub mod chat;
pub mod classify;
pub mod embed;
pub mod estimate;
mod experts;
pub mod feedback;
pub mod fields;
pub mod files;
pub mod format;
pub mod generate;
mod graders;
pub mod jobs;
pub mod mix;
mod once;
mod pins;
mod preferences;
pub mod problem;
pub mod sampling;
pub mod stop;
pub mod tools;
pub mod uploads;

use std::sync::Arc;

use tokio::sync::Notify;

pub use problem::{Fault, Problem};

use crate::{
    db::Db,
    inference::{Bases, Handle},
    outbound::Web,
    storage::BlobStore,
};

/// What the service works with. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    pub db: Db,
    pub store: Arc<dyn BlobStore>,
    pub bases: Bases,
    pub engine: Handle,
    /// Wakes a worker in this process when a job is queued.
    pub wake: Arc<Notify>,
    /// Wakes those that run batches.
    pub wake_batches: Arc<Notify>,
    /// The largest file that an upload may bring, in bytes.
    pub max_upload: u64,
    /// Days that answers are kept whose requests ask for it; 0 keeps none.
    pub retention_days: u32,
    /// Bytes that a job may take; none asks the machine.
    pub memory_limit: Option<u64>,
    /// For judges elsewhere.
    pub web: Web,
}
