//! The adapter of a run, for other threads to look at: they see it between two steps, never inside one.

use std::sync::{RwLock, RwLockReadGuard};

use super::checkpoint::adapter;
use crate::{
    domain::{self, Snapshot},
    methods::Trainable,
};

pub struct Live(RwLock<State>);

pub struct State {
    /// Finished steps.
    pub step: u64,
    pub method: Box<dyn Trainable>,
}

impl Live {
    pub fn new(step: u64, method: Box<dyn Trainable>) -> Self {
        Self(RwLock::new(State { step, method }))
    }

    /// Nobody changes it meanwhile.
    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Nobody sees it before `change` has ended.
    pub fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        change(&mut self.0.write().unwrap_or_else(|e| e.into_inner()))
    }
}

impl domain::Live for Live {
    fn step(&self) -> u64 {
        self.read().step
    }

    fn snapshot(&self) -> anyhow::Result<Snapshot> {
        let state = self.read();
        Ok(Snapshot { step: state.step, files: adapter(state.method.export()?) })
    }
}
