//! Adapters in memory, by base and generation: loaded once however many wait, evicted when room is needed and nobody
//! holds them. Never more than the budget.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::{Duration, Instant},
};

use futures::FutureExt;
use tokio::runtime;

use super::{AdapterRef, ArtifactError, EngineError, EngineSettings, Residency, Resident, artifact::read_adapter};
use crate::{
    methods::{AdapterFiles, MethodError},
    model::{Base, Hook},
    storage::{BlobStore, StorageError},
};

/// How long a missing or damaged generation is remembered as such.
const NEGATIVE: Duration = Duration::from_secs(5);
/// Attempts to read from a store that is away.
const ATTEMPTS: u32 = 3;

/// An adapter that a request holds from its first token to its last.
pub type Lease = Arc<dyn Hook>;

/// Makes an adapter of its files.
pub type Loader = fn(&AdapterFiles, &Base) -> Result<Lease, MethodError>;

/// The base's id and the generation.
type Name = (String, String);

enum Entry {
    Loading { bytes: u64 },
    Ready { hook: Lease, bytes: u64, used: u64, hits: u64, load_time: Duration },
    Failed { error: EngineError, until: Instant },
}

impl Entry {
    fn bytes(&self) -> u64 {
        match self {
            Self::Loading { bytes } | Self::Ready { bytes, .. } => *bytes,
            Self::Failed { .. } => 0,
        }
    }
}

/// What a look into the registry gives.
pub enum Found {
    Ready(Lease),
    /// On its way; the caller hears of it.
    Loading,
    /// Adapters in use take all the room.
    NoRoom,
    Failed(EngineError),
}

#[derive(Default)]
struct State {
    entries: HashMap<Name, Entry>,
    /// Forgotten while in use: they take up room until the last request lets go.
    retired: Vec<(Weak<dyn Hook>, u64)>,
    /// Counts looks: the clock of "least recently used".
    clock: u64,
}

pub struct Registry {
    store: Arc<dyn BlobStore>,
    runtime: runtime::Handle,
    budget: u64,
    patience: Duration,
    loader: Loader,
    state: Mutex<State>,
}

impl Registry {
    pub fn new(store: Arc<dyn BlobStore>, runtime: runtime::Handle, settings: &EngineSettings) -> Self {
        let EngineSettings { adapter_budget_bytes: budget, adapter_patience: patience, loader, .. } = *settings;
        Self { store, runtime, budget, patience, loader, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The adapter, or makes room and starts to load it; `when_loaded` runs once it is there or has failed.
    pub fn get(
        self: &Arc<Self>,
        resident: &Resident,
        adapter: &AdapterRef,
        when_loaded: impl FnOnce() + Send + 'static,
    ) -> Found {
        let name = (resident.base.info.id.clone(), adapter.generation.clone());
        let mut state = self.state();
        state.clock += 1;
        let clock = state.clock;
        match state.entries.get_mut(&name) {
            Some(Entry::Ready { hook, used, hits, .. }) => {
                *used = clock;
                *hits += 1;
                return Found::Ready(hook.clone());
            }
            Some(Entry::Loading { .. }) => return Found::Loading,
            Some(Entry::Failed { error, until }) if Instant::now() < *until => return Found::Failed(error.clone()),
            _ => {}
        }
        let bytes = adapter.bytes;
        if bytes > self.budget {
            return Found::Failed(EngineError::TooLarge { bytes, limit: self.budget });
        }
        if !state.make_room(bytes, self.budget) {
            return Found::NoRoom;
        }
        state.entries.insert(name.clone(), Entry::Loading { bytes });
        drop(state);
        let (registry, resident, adapter) = (self.clone(), resident.clone(), adapter.clone());
        let since = Instant::now();
        self.runtime.spawn(async move {
            let load = AssertUnwindSafe(registry.load(&resident, &adapter)).catch_unwind();
            let loaded = match tokio::time::timeout(registry.patience, load).await {
                Ok(Ok(loaded)) => loaded,
                Ok(Err(_)) => Err(EngineError::Internal("loading an adapter crashed".to_owned())),
                Err(_) => Err(EngineError::Late(registry.patience)),
            };
            registry.settle(name, bytes, since.elapsed(), loaded);
            when_loaded();
        });
        Found::Loading
    }

    async fn load(&self, resident: &Resident, adapter: &AdapterRef) -> Result<Lease, EngineError> {
        let mut attempt = 0;
        let (manifest, files) = loop {
            attempt += 1;
            match read_adapter(&self.store, &adapter.generation).await {
                Ok(read) => break read,
                Err(ArtifactError::Storage(StorageError::Unavailable(_))) if attempt < ATTEMPTS => {
                    tokio::time::sleep(Duration::from_millis(50 << attempt)).await;
                }
                Err(ArtifactError::Storage(StorageError::Unavailable(why))) => {
                    return Err(EngineError::Unavailable(why));
                }
                Err(error) => return Err(EngineError::Adapter(error.to_string())),
            }
        };
        let info = &resident.base.info;
        if manifest.base_hash != info.hash {
            let message = format!("the adapter was made for another base than {} ({})", info.id, info.hash);
            return Err(EngineError::Adapter(message));
        }
        let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
        if bytes != adapter.bytes {
            let message = format!("the adapter's files have {bytes} bytes, not {} as recorded", adapter.bytes);
            return Err(EngineError::Adapter(message));
        }
        let (base, loader) = (resident.base.clone(), self.loader);
        let hook = tokio::task::spawn_blocking(move || loader(&files, &base)).await;
        let hook = hook.map_err(|_| EngineError::Internal("loading an adapter crashed".to_owned()))?;
        hook.map_err(|e| EngineError::Adapter(e.to_string()))
    }

    fn settle(&self, name: Name, bytes: u64, load_time: Duration, loaded: Result<Lease, EngineError>) {
        let mut state = self.state();
        let entry = match loaded {
            Ok(hook) => Entry::Ready { hook, bytes, used: state.clock, hits: 0, load_time },
            Err(error) => Entry::Failed { error, until: Instant::now() + NEGATIVE },
        };
        state.entries.insert(name, entry);
    }

    /// Forgets a generation; those who hold it keep it to their end.
    pub fn evict(&self, generation: &str) {
        let mut state = self.state();
        let is_gone = |name: &Name, entry: &mut Entry| name.1 == generation && !matches!(entry, Entry::Loading { .. });
        let gone: Vec<Entry> = state.entries.extract_if(is_gone).map(|(_, entry)| entry).collect();
        let held = gone.iter().filter_map(|entry| match entry {
            Entry::Ready { hook, bytes, .. } => Some((Arc::downgrade(hook), *bytes)),
            _ => None,
        });
        state.retired.extend(held);
    }

    /// How many adapters take up room, and how much.
    pub fn held(&self) -> (usize, u64) {
        let mut state = self.state();
        let bytes = state.bytes();
        let entries = state.entries.values().filter(|entry| !matches!(entry, Entry::Failed { .. }));
        (entries.count() + state.retired.len(), bytes)
    }

    pub fn residency(&self) -> Vec<Residency> {
        let state = self.state();
        let ready = state.entries.iter().filter_map(|((_, generation), entry)| match entry {
            Entry::Ready { bytes, hits, used, load_time, .. } => {
                let (bytes, hits, load_time) = (*bytes, *hits, *load_time);
                Some((*used, Residency { generation: generation.clone(), bytes, hits, load_time }))
            }
            _ => None,
        });
        let mut ready: Vec<_> = ready.collect();
        ready.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
        ready.into_iter().map(|(_, residency)| residency).collect()
    }
}

impl State {
    fn bytes(&mut self) -> u64 {
        self.retired.retain(|(hook, _)| hook.strong_count() > 0);
        self.entries.values().map(Entry::bytes).sum::<u64>() + self.retired.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// Drops the least recently used adapters that nobody holds until `wanted` more bytes keep the budget; false when
    /// those in use leave too little.
    fn make_room(&mut self, wanted: u64, budget: u64) -> bool {
        let now = Instant::now();
        self.entries.retain(|_, entry| !matches!(entry, Entry::Failed { until, .. } if *until <= now));
        while self.bytes().saturating_add(wanted) > budget {
            let free = self.entries.iter().filter_map(|(name, entry)| match entry {
                Entry::Ready { hook, used, .. } if Arc::strong_count(hook) == 1 => Some((*used, name)),
                _ => None,
            });
            let Some(oldest) = free.min().map(|(_, name)| name.clone()) else { return false };
            self.entries.remove(&oldest);
        }
        true
    }
}
