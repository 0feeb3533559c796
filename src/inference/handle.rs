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
    AdapterRef, Bases, EngineError, Output, Request, Residency, Resident, Tier,
    disk::{DiskCache, DiskSettings},
    engine::{self, Command},
    live::Lives,
    registry::{Lease, Loader, Registry},
    reply::{Place, Reply},
};
use crate::{
    methods::{self, AdapterFiles},
    model::{Turns, cache::KvBudget},
    storage::BlobStore,
};

/// Limits of the engine.
#[derive(Clone, Debug)]
pub struct EngineSettings {
    /// Sequences in one forward.
    pub max_batch: usize,
    /// Rows in one forward: prompts are read in pieces of this many tokens.
    pub max_tokens_per_step: usize,
    /// Bytes of keys and values, those included that are kept for sequences that begin alike.
    pub kv_bytes: usize,
    /// Requests that wait.
    pub queue: usize,
    /// Bytes of adapters in memory, those in use and those on their way included.
    pub adapter_budget_bytes: u64,
    /// Where adapters are kept between memory and the store; none goes to the store each time.
    pub adapter_disk: Option<DiskSettings>,
    /// How long a request waits for its adapter.
    pub adapter_patience: Duration,
    /// Of the time, what is left to training in this process while requests are served.
    pub training_share: f64,
    /// Makes an adapter of its files.
    pub loader: Loader,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            max_batch: 32,
            max_tokens_per_step: 512,
            kv_bytes: 1 << 30,
            queue: 256,
            adapter_budget_bytes: 1 << 30,
            adapter_disk: None,
            adapter_patience: Duration::from_secs(60),
            training_share: 0.45,
            loader: methods::load,
        }
    }
}

/// What the engine has in hand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Requests that no step has taken up yet.
    pub waiting: usize,
    /// Sequences that steps have taken up.
    pub running: usize,
    /// Bytes of keys and values, shared ones counted once.
    pub kv_bytes: usize,
    /// Adapters in memory or on their way there, and their bytes. Those that were evicted while in use count as well.
    pub adapters: usize,
    pub adapter_bytes: u64,
}

/// Sends requests to the one thread that owns the device for serving.
#[derive(Clone)]
pub struct Handle {
    commands: Arc<channel::Sender<Command>>,
    waiting: Arc<AtomicUsize>,
    running: Arc<AtomicUsize>,
    limit: usize,
    turns: Arc<Turns>,
    memory: Arc<KvBudget>,
    lives: Lives,
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
        let commands = Arc::new(commands);
        let (waiting, running) = (Arc::default(), Arc::default());
        let disk = match &settings.adapter_disk {
            None => None,
            Some(disk) => {
                let opened = DiskCache::open(disk)?;
                if opened.is_none() {
                    tracing::warn!("{} belongs to another process: adapters are not kept on disk", disk.dir.display());
                }
                opened
            }
        };
        let registry = Arc::new(Registry::new(store, disk, runtime, &settings));
        let (limit, lives, turns) = (settings.queue, Lives::default(), Arc::new(Turns::new(settings.training_share)));
        let memory = KvBudget::new(settings.kv_bytes);
        let threads = rayon::current_num_threads();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("serving-{i}"));
        let engine = engine::Engine {
            pool: pool.build().map_err(std::io::Error::other)?,
            bases,
            turns: turns.clone(),
            memory: memory.clone(),
            registry: registry.clone(),
            running: Arc::clone(&running),
            settings,
            inbox,
            commands: Arc::downgrade(&commands),
        };
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || engine.run())?;
        Ok(Self {
            commands,
            waiting,
            running,
            limit,
            turns,
            memory,
            lives,
            registry,
            thread: Arc::new(Mutex::new(Some(thread))),
        })
    }

    /// Queues a request; what comes back ends with `Done` or `Failed`. Dropping the receiver frees everything within a
    /// step.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Output>, EngineError> {
        self.queue(request, None)
    }

    /// The same with an adapter that is in memory already, and need not be in the store (a policy in training).
    pub fn submit_with(&self, request: Request, lease: Lease) -> Result<mpsc::Receiver<Output>, EngineError> {
        self.queue(request, Some(lease))
    }

    fn queue(&self, request: Request, lease: Option<Lease>) -> Result<mpsc::Receiver<Output>, EngineError> {
        if request.prompt.is_empty() {
            return Err(EngineError::Internal("a request without a prompt reached the engine".to_owned()));
        }
        let place = Place::take_below(&self.waiting, self.limit).ok_or(EngineError::Full { limit: self.limit })?;
        // Room for all that can come: the engine never waits for a reader, however slow.
        let (output, receiver) = mpsc::channel(request.max_tokens + 4);
        let command = Command::Request(Box::new(request), Reply::new(output, place), lease);
        self.commands.send(command).map_err(|_| EngineError::Stopping)?;
        Ok(receiver)
    }

    pub fn status(&self) -> Status {
        let (adapters, adapter_bytes) = self.registry.held();
        let count = |n: &AtomicUsize| n.load(Ordering::Relaxed);
        let (waiting, running) = (count(&self.waiting), count(&self.running));
        Status { waiting, running, kv_bytes: self.memory.used(), adapters, adapter_bytes }
    }

    /// Adapters in memory, most recently used first.
    pub fn residency(&self) -> Vec<Residency> {
        self.registry.residency()
    }

    /// The nearest place that has it.
    pub fn tier(&self, generation: &str) -> Tier {
        self.registry.tier(generation)
    }

    /// From now on these stay in memory and on disk, and no others; those that are not there are loaded.
    pub fn pin(&self, pins: &[(Resident, AdapterRef)]) {
        self.registry.pin(pins);
    }

    /// Bytes of adapters that may be in memory.
    pub fn adapter_budget(&self) -> u64 {
        self.registry.budget()
    }

    /// Bytes of adapters on disk.
    pub fn adapter_disk_bytes(&self) -> u64 {
        self.registry.disk_bytes()
    }

    /// What training in this process gives way to.
    pub fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// The training runs of this process.
    pub fn lives(&self) -> &Lives {
        &self.lives
    }

    /// Takes an adapter that was just made into memory, where there is room for it: nobody waits for the store.
    pub fn keep(&self, resident: &Resident, adapter: &AdapterRef, files: &AdapterFiles) {
        self.registry.keep(resident, adapter, files);
    }

    /// Forgets a generation wherever it was kept (its last name was deleted); requests that hold it end with it.
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
