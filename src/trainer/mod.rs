//! The one loop. Synchronous: data in, observer out. No database, no store, no async.

mod checkpoint;
mod estimate;
mod eval;
mod experience;
mod gradient;
mod live;
mod optim;
mod order;
mod plan;
mod rows;
mod schedule;
mod steps;
#[cfg(test)]
mod tests;

use std::{sync::Arc, thread};

use crate::{
    data::Row,
    domain::{Metrics, Observer, Snapshot, TrainSpec, Training},
    methods::{AdapterFiles, MethodError},
    model::{Base, Turns},
};

pub use estimate::{estimate, speed};
pub use experience::World;

/// What a run works on.
pub struct Run<'a> {
    pub spec: &'a TrainSpec,
    pub base: Arc<Base>,
    pub train: &'a [Row],
    pub valid: &'a [Row],
    /// Go on from here.
    pub resume: Option<&'a Snapshot>,
    /// Begin with this adapter's values instead of fresh ones; objectives with a reference are measured against it.
    pub start: Option<&'a AdapterFiles>,
    /// The adapters that a fresh one is made of, for methods that mix others.
    pub experts: &'a [AdapterFiles],
    /// Where completions come from, for objectives that learn from them.
    pub world: Option<World<'a>>,
    /// Gives way to serving; none has the machine to itself.
    pub turns: Option<Arc<Turns>>,
    /// Text to the base's token ids, for methods that begin as words.
    pub tokenize: &'a (dyn Fn(&str) -> Result<Vec<u32>, MethodError> + Sync),
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    Finished {
        adapter: AdapterFiles,
        metrics: Box<Metrics>,
    },
    /// At a checkpoint, as asked.
    Paused,
    Cancelled,
    Drained,
}

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The loss or a gradient is not finite: names the step.
    #[error("{0}")]
    Diverged(String),
    /// The checkpoint does not belong to this run: names what differs.
    #[error("{0}")]
    Checkpoint(String),
    /// The rows leave nothing to train on.
    #[error("{0}")]
    Data(String),
    #[error(transparent)]
    Method(#[from] MethodError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// Too many completions of a step have no reward.
    #[error("{0}")]
    Ungraded(String),
    /// The observer could not go on.
    #[error(transparent)]
    Observer(anyhow::Error),
}

/// Optimiser steps of a run on this many rows that can be trained on, of which it may have to hold some out.
pub fn total_steps(training: &Training, rows: usize, holds_out: bool) -> u64 {
    let held = if holds_out { order::held_out(training.validation_split, rows) } else { 0 };
    plan::Plan::new(training, rows - held).total_steps
}

/// The stack of the training thread: candle walks the graph by recursion, a frame or two for each op of the model.
const STACK: usize = 256 << 20;

/// Trains to the end, or until the observer says otherwise. Runs on a thread of its own with a large stack, and
/// returns when that has ended.
pub fn train(run: Run, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
    let turns = run.turns.clone();
    let mut work = || steps::Loop::prepare(&run, observer)?.run(observer);
    on_a_large_stack(|| match turns {
        Some(turns) => turns.training(work),
        None => work(),
    })
}

fn on_a_large_stack<T: Send>(work: impl FnOnce() -> Result<T, TrainError> + Send) -> Result<T, TrainError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("train".to_owned()).stack_size(STACK);
        let handle = thread.spawn_scoped(scope, work).map_err(|error| TrainError::Observer(error.into()))?;
        handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
