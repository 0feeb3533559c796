//! HTTP: the route table, and one file a resource. Handlers read a request, ask the service, write the answer.

mod adapters;
mod aliases;
mod auth;
mod batches;
mod chat;
mod classify;
mod completions;
mod embeddings;
mod error;
mod estimate;
mod extract;
mod feedback;
mod files;
mod graders;
mod health;
mod jobs;
mod kept;
mod list;
mod methods;
mod models;
mod openapi;
mod preferences;
mod prompt;
mod request;
mod router;
mod said;
pub mod serve;
mod stream;
mod uploads;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

pub use batches::Inside;
pub use openapi::document;
pub use router::router;

use crate::service::Service;

/// What handlers get.
#[derive(Clone)]
pub struct AppState {
    pub service: Service,
    /// Cleared while the process stops: load balancers look elsewhere.
    ready: Arc<AtomicBool>,
}

impl AppState {
    pub fn new(service: Service) -> Self {
        Self { service, ready: Arc::new(AtomicBool::new(true)) }
    }

    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// From now on load balancers look elsewhere, and followers of jobs are let go.
    pub fn drain(&self) {
        self.ready.store(false, Ordering::Relaxed);
    }
}
