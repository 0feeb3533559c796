//! Adapters in training, served from memory as they are between two steps. Each step's is a generation of its own; a
//! request keeps the one that it began with.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use anyhow::Context as _;

use super::{
    AdapterRef, Resident,
    artifact::{adapter_of, generation_of, listed},
    hands,
    registry::Lease,
};
use crate::{
    domain::Live,
    methods::{self, AdapterFiles},
};

/// An adapter that is in memory and need not be in the store.
#[derive(Clone)]
pub struct InMemory {
    pub adapter: AdapterRef,
    pub lease: Lease,
}

impl InMemory {
    pub fn new(files: &AdapterFiles, resident: &Resident) -> anyhow::Result<Self> {
        let (lease, listed) = (methods::load(files, &resident.base)?, listed(files));
        let bytes = listed.iter().map(|file| file.bytes).sum();
        let adapter = AdapterRef { generation: generation_of(&listed), bytes, virtual_tokens: lease.places() };
        Ok(Self { adapter, lease })
    }
}

/// A training run of this process.
pub struct LiveRun {
    pub resident: Resident,
    pub job: String,
    /// The job's method.
    pub method: String,
    source: Arc<dyn Live>,
    /// What was asked for last, and the step that it is of.
    made: Mutex<Option<(u64, InMemory)>>,
}

impl LiveRun {
    pub fn new(job: &str, method: &str, resident: &Resident, source: Arc<dyn Live>) -> Self {
        let (job, method) = (job.to_owned(), method.to_owned());
        Self { resident: resident.clone(), job, method, source, made: Mutex::default() }
    }

    /// The adapter of the newest step, and that step. Made once a step, when somebody asks; waits for a change that is
    /// under way, so it must not be called where nobody may wait.
    pub fn current(&self) -> anyhow::Result<(u64, InMemory)> {
        let mut made = self.made.lock().unwrap_or_else(|e| e.into_inner());
        match made.as_ref() {
            Some((step, adapter)) if *step == self.source.step() => Ok((*step, adapter.clone())),
            _ => {
                let snapshot = self.source.snapshot()?;
                let files = adapter_of(&snapshot).context("a live adapter without files")?;
                let made_of = || InMemory::new(&files, &self.resident);
                let new = (snapshot.step, hands::at_once(made_of)?);
                Ok(made.insert(new).clone())
            }
        }
    }
}

/// Project and name.
type Name = (String, String);

/// The runs of this process, by their names.
#[derive(Clone, Default)]
pub struct Lives(Arc<Mutex<HashMap<Name, Arc<LiveRun>>>>);

impl Lives {
    fn runs(&self) -> MutexGuard<'_, HashMap<Name, Arc<LiveRun>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn get(&self, project: &str, name: &str) -> Option<Arc<LiveRun>> {
        self.runs().get(&(project.to_owned(), name.to_owned())).cloned()
    }

    /// The run can be asked for by these names until what comes back is dropped.
    pub fn show(&self, project: &str, names: &[&str], run: LiveRun) -> Shown {
        let run = Arc::new(run);
        let names: Vec<Name> = names.iter().map(|name| (project.to_owned(), (*name).to_owned())).collect();
        self.runs().extend(names.iter().map(|name| (name.clone(), run.clone())));
        Shown { lives: self.clone(), names, run }
    }
}

/// A run that can be asked for.
pub struct Shown {
    lives: Lives,
    names: Vec<Name>,
    run: Arc<LiveRun>,
}

impl Drop for Shown {
    fn drop(&mut self) {
        let mut runs = self.lives.runs();
        for name in &self.names {
            // A later attempt may have the name by now.
            if runs.get(name).is_some_and(|run| Arc::ptr_eq(run, &self.run)) {
                runs.remove(name);
            }
        }
    }
}
