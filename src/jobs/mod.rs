//! Jobs in the background: a worker claims a row, trains on a thread of its own, and publishes what came out.

pub mod batch;
pub mod judge;
mod label;
pub mod memory;
mod observe;
mod publish;
mod rollout;
mod run;
mod worker;

use std::sync::Arc;

pub use publish::publish_adapter;
pub use worker::{Worker, start};

pub use rollout::{EngineRollout, GraderReward};

use crate::{
    db::Db,
    inference::{Bases, Handle},
    outbound::Web,
    storage::BlobStore,
};

/// What a worker works with.
#[derive(Clone)]
pub struct Context {
    pub db: Db,
    pub store: Arc<dyn BlobStore>,
    pub bases: Bases,
    /// Bytes that a job may take; none asks the machine.
    pub memory_limit: Option<u64>,
    /// For objectives that learn from the model's own completions.
    pub engine: Handle,
    /// For judges elsewhere.
    pub web: Web,
}

impl Context {
    fn means(&self) -> judge::Means {
        let Self { db, bases, engine, web, .. } = self.clone();
        judge::Means { db, bases, engine, web }
    }
}

/// Unix seconds of this machine: for labels only; leases use the database's clock.
pub fn now() -> i64 {
    chrono::Utc::now().timestamp()
}
