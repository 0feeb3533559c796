//! The one loop. Synchronous: data in, observer out. No database, no store, no async.

use std::sync::Arc;

use crate::{
    data::Example,
    domain::{Metrics, Observer, Snapshot, TrainSpec},
    methods::AdapterFiles,
    model::Base,
};

/// What a run works on.
pub struct Run<'a> {
    pub spec: &'a TrainSpec,
    pub base: Arc<Base>,
    pub train: &'a [Example],
    pub valid: &'a [Example],
    /// Go on from here.
    pub resume: Option<&'a Snapshot>,
    /// Begin with this adapter's values instead of fresh ones.
    pub start: Option<&'a AdapterFiles>,
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    Finished {
        adapter: AdapterFiles,
        metrics: Metrics,
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
    Method(#[from] crate::methods::MethodError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The observer could not go on.
    #[error(transparent)]
    Observer(anyhow::Error),
}

/// Optimiser steps that the spec makes on this many training rows.
pub fn total_steps(spec: &TrainSpec, rows: usize) -> u64 {
    let _ = (spec, rows);
    todo!("trainer helper")
}

/// Trains to the end, or until the observer says otherwise.
pub fn train(run: Run, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
    let _ = (run, observer);
    todo!("trainer helper")
}
