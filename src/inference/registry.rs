//! Adapters in memory, by base and generation: loaded once however many wait, from the disk or by way of it from the
//! store, and evicted when room is needed, unless somebody holds them or they are pinned. Never more than the budget.

use std::{
    collections::{HashMap, HashSet},
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::{Duration, Instant},
};

use futures::FutureExt;
use tokio::runtime;

use super::{
    AdapterRef, ArtifactError, EngineError, EngineSettings, Mix, Residency, Resident, Tier,
    artifact::read_through,
    disk::DiskCache,
    hands,
    worth::{Clock, Worth},
};
use crate::{
    domain::Manifest,
    methods::{self, AdapterFiles, MethodError},
    model::{Base, Hook},
    storage::{BlobStore, StorageError},
};

/// How long a missing or damaged generation is remembered as such.
const NEGATIVE: Duration = Duration::from_secs(5);
/// How many of them: beyond it the oldest is looked for again.
const MAX_NEGATIVE: usize = 1024;
/// Attempts to read from a store that is away.
const ATTEMPTS: u32 = 3;
/// Attempts to read what came damaged: it may have been on the way that it was.
const DAMAGED_ATTEMPTS: u32 = 2;

/// An adapter that a request holds from its first token to its last.
pub type Lease = Arc<dyn Hook>;

/// Makes an adapter of its files.
pub type Loader = fn(&AdapterFiles, &Base) -> Result<Lease, MethodError>;

/// The base's id and the generation.
type Name = (String, String);

enum Entry {
    Loading { bytes: u64 },
    Ready { hook: Lease, bytes: u64, worth: Worth, hits: u64, load_time: Duration },
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
    clock: Clock,
    pinned: HashSet<Name>,
}

pub struct Registry {
    store: Arc<dyn BlobStore>,
    disk: Option<Arc<DiskCache>>,
    runtime: runtime::Handle,
    budget: u64,
    patience: Duration,
    loader: Loader,
    state: Mutex<State>,
}

impl Registry {
    pub fn new(
        store: Arc<dyn BlobStore>,
        disk: Option<DiskCache>,
        runtime: runtime::Handle,
        settings: &EngineSettings,
    ) -> Self {
        let EngineSettings { adapter_budget_bytes: budget, adapter_patience: patience, loader, .. } = *settings;
        Self { store, disk: disk.map(Arc::new), runtime, budget, patience, loader, state: Mutex::default() }
    }

    pub fn budget(&self) -> u64 {
        self.budget
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
        let mut guard = self.state();
        let state = &mut *guard;
        match state.entries.get_mut(&name) {
            Some(Entry::Ready { hook, worth, hits, .. }) => {
                *hits += 1;
                *worth = state.clock.used(*hits);
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
        drop(guard);
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

    /// Makes an adapter of files at hand, where there is room without evicting another.
    pub fn keep(&self, resident: &Resident, adapter: &AdapterRef, files: &AdapterFiles) {
        let name = (resident.base.info.id.clone(), adapter.generation.clone());
        let mut state = self.state();
        let is_known = matches!(state.entries.get(&name), Some(Entry::Ready { .. } | Entry::Loading { .. }));
        if is_known || state.bytes().saturating_add(adapter.bytes) > self.budget {
            return;
        }
        state.entries.insert(name.clone(), Entry::Loading { bytes: adapter.bytes });
        drop(state);
        let since = Instant::now();
        let made = (self.loader)(files, &resident.base).map_err(|error| EngineError::Adapter(error.to_string()));
        self.settle(name, adapter.bytes, since.elapsed(), made);
    }

    async fn load(&self, resident: &Resident, adapter: &AdapterRef) -> Result<Lease, EngineError> {
        let mix = Mix::parse(&adapter.generation);
        let parts = mix.clone().map_or_else(|| vec![(adapter.generation.clone(), 1.0)], |mix| mix.0);
        let (mut files, mut bytes) = (Vec::with_capacity(parts.len()), 0);
        for (generation, weight) in parts {
            let (manifest, part) = self.read(&generation).await?;
            let info = &resident.base.info;
            if manifest.base_hash != info.hash {
                let message = format!("the adapter was made for another base than {} ({})", info.id, info.hash);
                return Err(EngineError::Adapter(message));
            }
            bytes += manifest.files.iter().map(|file| file.bytes).sum::<u64>();
            files.push((part, weight));
        }
        if bytes != adapter.bytes {
            let message = format!("the adapter's files have {bytes} bytes, not {} as recorded", adapter.bytes);
            return Err(EngineError::Adapter(message));
        }
        let (base, loader) = (resident.base.clone(), self.loader);
        let hook = hands::begin(move || match (&mix, files.as_slice()) {
            (None, [(files, _)]) => loader(files, &base),
            (_, files) => methods::mix::mix(files, &base),
        });
        let hook = hook.await.map_err(|_| EngineError::Internal("loading an adapter crashed".to_owned()))?;
        let hook = hook.map_err(|e| EngineError::Adapter(e.to_string()))?;
        // The context was shared out by the record.
        match (hook.places(), adapter.virtual_tokens) {
            (there, recorded) if there == recorded => Ok(hook),
            (there, recorded) => {
                let message = format!("the adapter takes {there} places of the context, not {recorded} as recorded");
                Err(EngineError::Adapter(message))
            }
        }
    }

    /// One generation's files, tried again where that may help.
    async fn read(&self, generation: &str) -> Result<(Manifest, AdapterFiles), EngineError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            match read_through(&self.store, self.disk.as_ref(), generation).await {
                Ok(read) => return Ok(read),
                Err(ArtifactError::Damaged(_)) if attempt < DAMAGED_ATTEMPTS => {}
                Err(ArtifactError::Storage(StorageError::Unavailable(_))) if attempt < ATTEMPTS => {
                    tokio::time::sleep(Duration::from_millis(50 << attempt)).await;
                }
                Err(ArtifactError::Storage(StorageError::Unavailable(why))) => {
                    return Err(EngineError::Unavailable(why));
                }
                Err(error) => return Err(EngineError::Adapter(error.to_string())),
            }
        }
    }

    fn settle(&self, name: Name, bytes: u64, load_time: Duration, loaded: Result<Lease, EngineError>) {
        let mut state = self.state();
        let entry = match loaded {
            Ok(hook) => Entry::Ready { hook, bytes, worth: state.clock.used(1), hits: 0, load_time },
            Err(error) => {
                state.forget_failures(Instant::now());
                Entry::Failed { error, until: Instant::now() + NEGATIVE }
            }
        };
        state.entries.insert(name, entry);
    }

    /// Only these are never evicted from now on; those that are not there are loaded while there is room.
    pub fn pin(self: &Arc<Self>, pins: &[(Resident, AdapterRef)]) {
        let name =
            |(resident, adapter): &(Resident, AdapterRef)| (resident.base.info.id.clone(), adapter.generation.clone());
        let names: HashSet<Name> = pins.iter().map(name).collect();
        if let Some(disk) = &self.disk {
            disk.pin(names.iter().map(|(_, generation)| generation.clone()).collect());
        }
        let missing: Vec<&(Resident, AdapterRef)> = {
            let mut state = self.state();
            state.pinned = names;
            pins.iter().filter(|pin| !state.entries.contains_key(&name(pin))).collect()
        };
        for (resident, adapter) in missing {
            // What has no room now finds it at the next look.
            _ = self.get(resident, adapter, || ());
        }
    }

    /// The nearest place that has it.
    pub fn tier(&self, generation: &str) -> Tier {
        let is_here = |((_, name), entry): (&Name, &Entry)| name == generation && matches!(entry, Entry::Ready { .. });
        if self.state().entries.iter().any(is_here) {
            Tier::Memory
        } else if self.disk.as_ref().is_some_and(|disk| disk.has(generation)) {
            Tier::Disk
        } else {
            Tier::Store
        }
    }

    /// Bytes of adapters on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.disk.as_ref().map_or(0, |disk| disk.bytes())
    }

    /// Forgets a generation; those who hold it keep it to their end.
    pub fn evict(&self, generation: &str) {
        if let Some(disk) = &self.disk {
            disk.remove(generation);
        }
        let mut state = self.state();
        // A mixture's name has all of its generations in it.
        let is_gone =
            |name: &Name, entry: &mut Entry| name.1.contains(generation) && !matches!(entry, Entry::Loading { .. });
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
            Entry::Ready { bytes, hits, worth, load_time, .. } => {
                let (bytes, hits, load_time) = (*bytes, *hits, *load_time);
                Some((worth.used(), Residency { generation: generation.clone(), bytes, hits, load_time }))
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

    /// Drops the adapters that are worth least and that nobody holds until `wanted` more bytes keep the budget; false
    /// when those in use leave too little.
    fn make_room(&mut self, wanted: u64, budget: u64) -> bool {
        self.forget_failures(Instant::now());
        while self.bytes().saturating_add(wanted) > budget {
            let free = self.entries.iter().filter_map(|(name, entry)| match entry {
                Entry::Ready { hook, worth, .. } if Arc::strong_count(hook) == 1 && !self.pinned.contains(name) => {
                    Some((*worth, name))
                }
                _ => None,
            });
            let Some((worth, name)) = free.min() else { return false };
            let name = name.clone();
            self.entries.remove(&name);
            self.clock.gone(worth);
        }
        true
    }

    /// Those whose time is over, and the oldest when there are too many.
    fn forget_failures(&mut self, now: Instant) {
        self.entries.retain(|_, entry| !matches!(entry, Entry::Failed { until, .. } if *until <= now));
        let failed = |(name, entry): (&Name, &Entry)| match entry {
            Entry::Failed { until, .. } => Some((*until, name.clone())),
            _ => None,
        };
        let mut all: Vec<(Instant, Name)> = self.entries.iter().filter_map(failed).collect();
        if all.len() >= MAX_NEGATIVE {
            all.sort();
            all[..=all.len() - MAX_NEGATIVE].iter().for_each(|(_, name)| drop(self.entries.remove(name)));
        }
    }
}
