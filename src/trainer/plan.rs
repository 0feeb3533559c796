//! Which rows belong to which optimiser step.

use std::ops::Range;

use crate::domain::Training;

pub struct Plan {
    pub batch_size: usize,
    pub total_steps: u64,
    rows: usize,
    rows_per_step: usize,
    pub steps_per_epoch: u64,
}

impl Plan {
    /// An epoch's last step may be smaller; no step holds rows of two epochs.
    pub fn new(training: &Training, rows: usize) -> Self {
        let batch_size = (training.batch_size as usize).max(1);
        let rows_per_step = batch_size * (training.grad_accumulation as usize).max(1);
        let steps_per_epoch = rows.div_ceil(rows_per_step) as u64;
        let all = steps_per_epoch * training.n_epochs;
        let total_steps = training.max_steps.map_or(all, |most| all.min(most));
        Self { batch_size, total_steps, rows, rows_per_step, steps_per_epoch }
    }

    /// The epoch of a step (from 0) and the places of its rows in the epoch's order.
    pub fn rows_of(&self, step: u64) -> (u64, Range<usize>) {
        let start = (step % self.steps_per_epoch) as usize * self.rows_per_step;
        (step / self.steps_per_epoch, start..(start + self.rows_per_step).min(self.rows))
    }

    /// Whether an epoch is complete after this many steps.
    pub fn is_epoch_end(&self, finished: u64) -> bool {
        finished.is_multiple_of(self.steps_per_epoch)
    }
}
