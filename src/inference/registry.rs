//! Adapters in memory, by generation: loaded once however many wait, evicted when the budget is spent and nobody
//! holds them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::runtime;

use super::{ArtifactError, Bases, EngineError, Residency, artifact::read_adapter};
use crate::{
    methods,
    model::Hook,
    storage::{BlobStore, StorageError},
};

/// How long a missing or damaged generation is remembered as such.
const NEGATIVE: Duration = Duration::from_secs(5);
/// Attempts to read from a store that is away.
const ATTEMPTS: u32 = 3;

/// An adapter that a request holds from its first token to its last.
pub type Lease = Arc<dyn Hook>;

enum Entry {
    Loading,
    Ready { hook: Lease, bytes: u64, used: u64, hits: u64 },
    Failed { error: EngineError, until: Instant },
}

/// What a look into the registry gives.
pub enum Found {
    Ready(Lease),
    /// On its way; the caller hears of it.
    Loading,
    Failed(EngineError),
}

#[derive(Default)]
struct State {
    entries: HashMap<String, Entry>,
    /// Counts looks: the clock of "least recently used".
    clock: u64,
}

pub struct Registry {
    bases: Bases,
    store: Arc<dyn BlobStore>,
    runtime: runtime::Handle,
    budget: u64,
    state: Mutex<State>,
}

impl Registry {
    pub fn new(bases: Bases, store: Arc<dyn BlobStore>, runtime: runtime::Handle, budget: u64) -> Self {
        Self { bases, store, runtime, budget, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The adapter, or starts to load it; `when_loaded` runs once it is there or has failed.
    pub fn get(
        self: &Arc<Self>,
        base: &str,
        generation: &str,
        when_loaded: impl FnOnce(String) + Send + 'static,
    ) -> Found {
        let mut state = self.state();
        state.clock += 1;
        let clock = state.clock;
        match state.entries.get_mut(generation) {
            Some(Entry::Ready { hook, used, hits, .. }) => {
                *used = clock;
                *hits += 1;
                return Found::Ready(hook.clone());
            }
            Some(Entry::Loading) => return Found::Loading,
            Some(Entry::Failed { error, until }) if Instant::now() < *until => return Found::Failed(error.clone()),
            _ => {}
        }
        state.entries.insert(generation.to_owned(), Entry::Loading);
        drop(state);
        let (registry, base, generation) = (self.clone(), base.to_owned(), generation.to_owned());
        self.runtime.spawn(async move {
            let loaded = registry.load(&base, &generation).await;
            registry.settle(&generation, loaded);
            when_loaded(generation);
        });
        Found::Loading
    }

    async fn load(&self, base: &str, generation: &str) -> Result<(Lease, u64), EngineError> {
        let resident = self.bases.get(base).cloned();
        let resident = resident.ok_or_else(|| EngineError::Adapter(format!("the base {base} is not resident")))?;
        let mut attempt = 0;
        let (manifest, files) = loop {
            attempt += 1;
            match read_adapter(&self.store, generation).await {
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
        if manifest.generation != generation || manifest.base_hash != info.hash {
            let message = format!("the adapter was made for another base than {} ({})", info.id, info.hash);
            return Err(EngineError::Adapter(message));
        }
        let bytes = manifest.files.iter().map(|file| file.bytes).sum();
        let base = resident.base.clone();
        let hook = tokio::task::spawn_blocking(move || methods::load(&files, &base.info)).await;
        let hook = hook.map_err(|_| EngineError::Internal("loading an adapter crashed".to_owned()))?;
        Ok((hook.map_err(|e| EngineError::Adapter(e.to_string()))?, bytes))
    }

    fn settle(&self, generation: &str, loaded: Result<(Lease, u64), EngineError>) {
        let mut state = self.state();
        let entry = match loaded {
            Ok((hook, bytes)) => Entry::Ready { hook, bytes, used: state.clock, hits: 0 },
            Err(error) => Entry::Failed { error, until: Instant::now() + NEGATIVE },
        };
        state.entries.insert(generation.to_owned(), entry);
        state.shrink(self.budget, generation);
    }

    pub fn evict(&self, generation: &str) {
        self.state().entries.retain(|name, entry| name != generation || matches!(entry, Entry::Loading));
    }

    pub fn residency(&self) -> Vec<Residency> {
        let state = self.state();
        let ready = state.entries.iter().filter_map(|(generation, entry)| match entry {
            Entry::Ready { bytes, hits, used, .. } => {
                Some((*used, Residency { generation: generation.clone(), bytes: *bytes, hits: *hits }))
            }
            _ => None,
        });
        let mut ready: Vec<_> = ready.collect();
        ready.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
        ready.into_iter().map(|(_, residency)| residency).collect()
    }
}

impl State {
    /// Drops the least recently used adapters that nobody holds until the budget is kept; `newest` stays.
    fn shrink(&mut self, budget: u64, newest: &str) {
        let now = Instant::now();
        self.entries.retain(|_, entry| !matches!(entry, Entry::Failed { until, .. } if *until <= now));
        loop {
            let sizes = self.entries.values().map(|e| if let Entry::Ready { bytes, .. } = e { *bytes } else { 0 });
            if sizes.sum::<u64>() <= budget {
                return;
            }
            let free = self.entries.iter().filter_map(|(name, entry)| match entry {
                Entry::Ready { hook, used, .. } if Arc::strong_count(hook) == 1 && name != newest => {
                    Some((*used, name))
                }
                _ => None,
            });
            let Some(oldest) = free.min().map(|(_, name)| name.clone()) else { return };
            self.entries.remove(&oldest);
        }
    }
}
