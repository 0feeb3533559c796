//! What a training run tells to whoever listens, and what it is told.

use std::sync::Arc;

use super::Metrics;

/// What the run does after the current optimiser step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    Continue,
    /// Write a checkpoint and stop; the job can be resumed.
    Pause,
    /// Stop; what was done so far stays as checkpoints.
    Cancel,
    /// The process is going away: write a checkpoint and stop without using up an attempt.
    Drain,
}

/// Named files that together are a checkpoint: the adapter in PEFT's layout
/// (`adapter_config.json`, `adapter_model.safetensors`) and the trainer's own state
/// (`trainer.json`, `trainer.safetensors`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Finished optimiser steps.
    pub step: u64,
    pub files: Vec<(String, Vec<u8>)>,
}

/// The adapter of a run, for other threads to look at while it is trained.
pub trait Live: Send + Sync {
    /// Finished optimiser steps: another number is another adapter.
    fn step(&self) -> u64;
    /// The adapter's own files as they are between two steps.
    fn snapshot(&self) -> anyhow::Result<Snapshot>;
}

/// Listens to a run. Calls come from the training thread, in order; each may block until it is durable.
/// An error stops the run: it means that the listener's world is gone (a lost lease, a dead store).
pub trait Observer: Send {
    /// The first step is about to begin.
    fn begun(&mut self, live: Arc<dyn Live>) -> anyhow::Result<()> {
        _ = live;
        Ok(())
    }
    /// One optimiser step is done. The metrics are what the job's event carries.
    fn step(&mut self, metrics: &Metrics) -> anyhow::Result<Control>;
    /// A checkpoint is complete. `metrics` are those of the step it was made after, with the
    /// validation figures if they were computed.
    fn checkpoint(&mut self, snapshot: Snapshot, metrics: &Metrics) -> anyhow::Result<()>;
    /// A counted remark for the job's events, such as how many rows were dropped.
    fn message(&mut self, level: &str, text: &str) -> anyhow::Result<()>;
}
