//! The cheap, clonable way to the engine thread.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc as channel,
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::{runtime, sync::mpsc};

use super::{
    Bases, EngineError, Output, Request, Residency,
    engine::{self, Command},
    registry::Registry,
};
use crate::storage::BlobStore;

/// Limits of the engine.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Sequences in one forward.
    pub max_batch: usize,
    /// Rows in one forward: prompts are read in pieces of this many tokens.
    pub max_tokens_per_step: usize,
    /// Tokens that all running sequences together may come to hold in their caches.
    pub max_cached_tokens: usize,
    /// Requests that wait.
    pub queue: usize,
    /// Bytes of adapters in memory.
    pub adapter_budget_bytes: u64,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            max_batch: 32,
            max_tokens_per_step: 512,
            max_cached_tokens: 65_536,
            queue: 256,
            adapter_budget_bytes: 1 << 30,
        }
    }
}

/// Sends requests to the one thread that owns the device for serving.
#[derive(Clone)]
pub struct Handle {
    commands: channel::Sender<Command>,
    waiting: Arc<AtomicUsize>,
    limit: usize,
    registry: Arc<Registry>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Handle {
    /// Starts the engine thread. Adapters are loaded on `runtime`.
    pub fn start(
        bases: Bases,
        store: Arc<dyn BlobStore>,
        runtime: runtime::Handle,
        settings: EngineSettings,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = channel::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let registry = Arc::new(Registry::new(bases.clone(), store, runtime, settings.adapter_budget_bytes));
        let limit = settings.queue;
        let engine = engine::Engine {
            bases,
            registry: registry.clone(),
            waiting: waiting.clone(),
            settings,
            inbox,
            commands: commands.clone(),
        };
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || engine.run())?;
        Ok(Self { commands, waiting, limit, registry, thread: Arc::new(Mutex::new(Some(thread))) })
    }

    /// Queues a request. Dropping the receiver frees everything within a step.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Output>, EngineError> {
        if request.prompt.is_empty() {
            return Err(EngineError::Internal("a request without a prompt reached the engine".to_owned()));
        }
        let admitted =
            self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < self.limit).then_some(n + 1));
        if admitted.is_err() {
            return Err(EngineError::Full { limit: self.limit });
        }
        // Room for all that can come: the engine never waits for a reader.
        let (output, receiver) = mpsc::channel(request.max_tokens + 4);
        match self.commands.send(Command::Request(Box::new(request), output)) {
            Ok(()) => Ok(receiver),
            Err(_) => {
                self.waiting.fetch_sub(1, Ordering::Relaxed);
                Err(EngineError::Stopping)
            }
        }
    }

    /// Adapters in memory, most recently used first.
    pub fn residency(&self) -> Vec<Residency> {
        self.registry.residency()
    }

    /// Forgets a loaded generation (its last name was deleted); requests that hold it end with it.
    pub fn evict(&self, generation: &str) {
        self.registry.evict(generation);
    }

    /// Refuses what waits, lets running sequences end for at most `grace`, then ends the thread.
    pub async fn stop(&self, grace: Duration) {
        _ = self.commands.send(Command::Stop(grace));
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(thread) = thread {
            _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}
