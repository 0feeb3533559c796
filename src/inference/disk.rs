//! Adapters on a local disk, between memory and the store: a folder a generation, which is the hash of what is in it.
//! Whatever is read is checked against its manifest again; what is damaged is forgotten. The folder belongs to one
//! process, and never holds more than its budget.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use fs4::fs_std::FileExt;

use super::{
    CONFIG, WEIGHTS,
    artifact::{MANIFEST, generation_of, sha256},
    worth::{Clock, Worth},
};
use crate::{domain::Manifest, methods::AdapterFiles};

/// Where the folder is, and how many bytes it may take.
#[derive(Clone, Debug)]
pub struct DiskSettings {
    pub dir: PathBuf,
    pub budget: u64,
}

struct Kept {
    bytes: u64,
    uses: u64,
    worth: Worth,
}

#[derive(Default)]
struct State {
    kept: HashMap<String, Kept>,
    /// Of all that is kept, and of copies under way.
    bytes: u64,
    /// Copies that have begun: each has a folder of its own name.
    begun: u64,
    clock: Clock,
    pinned: HashSet<String>,
}

pub struct DiskCache {
    dir: PathBuf,
    budget: u64,
    state: Mutex<State>,
    /// Held until this is dropped.
    _lock: File,
}

const PARTIAL: &str = ".partial";

impl DiskCache {
    /// What is there from before counts, oldest first; what a killed process left half written goes. None when
    /// another process has the folder.
    pub fn open(settings: &DiskSettings) -> io::Result<Option<Self>> {
        let DiskSettings { dir, budget } = settings.clone();
        fs::create_dir_all(&dir)?;
        let lock = File::create(dir.join("lock"))?;
        if !lock.try_lock_exclusive()? {
            return Ok(None);
        }
        let mut found = Vec::new();
        for entry in fs::read_dir(&dir)? {
            let (entry, path) = entry.map(|entry| (entry.file_name(), entry.path()))?;
            let Some(name) = entry.to_str() else { continue };
            if name.ends_with(PARTIAL) {
                fs::remove_dir_all(&path)?;
            } else if is_generation(name) {
                let made = fs::metadata(&path)?.modified()?;
                found.push((made, name.to_owned(), size_of(&path)?));
            }
        }
        found.sort();
        let mut state = State::default();
        for (_, name, bytes) in found {
            let worth = state.clock.used(1);
            state.bytes += bytes;
            state.kept.insert(name, Kept { bytes, uses: 1, worth });
        }
        let cache = Self { dir, budget, state: Mutex::new(state), _lock: lock };
        cache.make_room(&mut cache.state(), 0);
        Ok(Some(cache))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn has(&self, generation: &str) -> bool {
        self.state().kept.contains_key(generation)
    }

    /// Bytes that are kept or on their way.
    pub fn bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Only these are never evicted.
    pub fn pin(&self, generations: HashSet<String>) {
        self.state().pinned = generations;
    }

    /// A generation's files, if they are here and whole.
    pub fn get(&self, generation: &str) -> Option<(Manifest, AdapterFiles)> {
        {
            let state = &mut *self.state();
            let kept = state.kept.get_mut(generation)?;
            kept.uses += 1;
            kept.worth = state.clock.used(kept.uses);
        }
        let read = self.read(generation);
        if read.is_none() {
            tracing::warn!("the copy of adapter {generation} on disk is damaged: it comes from the store again");
            self.remove(generation);
        }
        read
    }

    fn read(&self, generation: &str) -> Option<(Manifest, AdapterFiles)> {
        let dir = self.dir.join(generation);
        let manifest: Manifest = serde_json::from_slice(&fs::read(dir.join(MANIFEST)).ok()?).ok()?;
        if manifest.generation != generation || generation_of(&manifest.files) != generation {
            return None;
        }
        let mut files = AdapterFiles::default();
        for file in &manifest.files {
            let part = part(&mut files, &file.name)?;
            *part = fs::read(dir.join(&file.name)).ok()?;
            if part.len() as u64 != file.bytes || sha256(part) != file.sha256 {
                return None;
            }
        }
        Some((manifest, files))
    }

    pub fn remove(&self, generation: &str) {
        let state = &mut *self.state();
        if let Some(kept) = state.kept.remove(generation) {
            state.bytes -= kept.bytes;
            self.delete(&self.dir.join(generation));
        }
    }

    /// A copy of this many bytes begins; none when it finds no room, or cannot be written.
    pub fn begin(self: &Arc<Self>, manifest: &Manifest) -> Option<Incoming> {
        let generation = manifest.generation.as_str();
        let json = serde_json::to_vec(manifest).ok()?;
        let bytes = manifest.files.iter().map(|file| file.bytes).sum::<u64>() + json.len() as u64;
        if !is_generation(generation) || self.has(generation) {
            return None;
        }
        let mut state = self.state();
        if !self.make_room(&mut state, bytes) {
            return None;
        }
        state.bytes += bytes;
        state.begun += 1;
        let partial = self.dir.join(format!("{generation}.{}{PARTIAL}", state.begun));
        drop(state);
        let (cache, generation, is_whole) = (self.clone(), generation.to_owned(), AtomicBool::new(true));
        let copy = Incoming { cache, generation, bytes, partial, is_whole, is_kept: false };
        let made = fs::create_dir_all(&copy.partial).and_then(|()| fs::write(copy.partial.join(MANIFEST), json));
        copy.note(made);
        copy.is_whole().then_some(copy)
    }

    /// Drops what is worth least until `wanted` more bytes keep the budget; false when that cannot be.
    fn make_room(&self, state: &mut State, wanted: u64) -> bool {
        while state.bytes.saturating_add(wanted) > self.budget {
            let free = state.kept.iter().filter(|(generation, _)| !state.pinned.contains(*generation));
            let Some((generation, _)) = free.min_by_key(|(_, kept)| kept.worth) else { return false };
            let generation = generation.clone();
            if let Some(kept) = state.kept.remove(&generation) {
                state.bytes -= kept.bytes;
                state.clock.gone(kept.worth);
            }
            self.delete(&self.dir.join(generation));
        }
        true
    }

    fn delete(&self, dir: &Path) {
        if let Err(error) = fs::remove_dir_all(dir) {
            tracing::warn!("{} cannot be removed: {error}", dir.display());
        }
    }
}

/// A generation's files on their way to the disk. Dropped before it is kept, it leaves nothing.
pub struct Incoming {
    cache: Arc<DiskCache>,
    generation: String,
    bytes: u64,
    partial: PathBuf,
    /// False when the disk does not take it: the adapter is served without a copy.
    is_whole: AtomicBool,
    is_kept: bool,
}

impl Incoming {
    /// The files are all written: from now on they are found.
    pub fn keep(mut self) {
        let to = self.cache.dir.join(&self.generation);
        if !self.is_whole() {
            return;
        }
        self.note(fs::rename(&self.partial, to));
        self.is_kept = self.is_whole();
        if self.is_kept {
            let state = &mut *self.cache.state();
            let worth = state.clock.used(1);
            state.kept.insert(self.generation.clone(), Kept { bytes: self.bytes, uses: 1, worth });
        }
    }

    fn is_whole(&self) -> bool {
        self.is_whole.load(Ordering::Relaxed)
    }

    fn note(&self, result: io::Result<()>) {
        if let Err(error) = result {
            tracing::warn!("{}: {error}", self.partial.display());
            self.is_whole.store(false, Ordering::Relaxed);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.is_kept {
            self.cache.state().bytes -= self.bytes;
            self.cache.delete(&self.partial);
        }
    }
}

/// One of the files.
pub struct Copy {
    of: Arc<Incoming>,
    file: File,
}

impl Copy {
    pub fn begin(of: Arc<Incoming>, name: &str) -> Option<Self> {
        match File::create(of.partial.join(name)) {
            Ok(file) => Some(Self { of, file }),
            Err(error) => {
                of.note(Err(error));
                None
            }
        }
    }

    pub fn write(&mut self, bytes: &[u8]) {
        if self.of.is_whole() {
            self.of.note(self.file.write_all(bytes));
        }
    }
}

/// Where a file of this name goes.
pub fn part<'a>(files: &'a mut AdapterFiles, name: &str) -> Option<&'a mut Vec<u8>> {
    match name {
        CONFIG => Some(&mut files.config),
        WEIGHTS => Some(&mut files.weights),
        _ => None,
    }
}

fn is_generation(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn size_of(dir: &Path) -> io::Result<u64> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}
