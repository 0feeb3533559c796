//! The arithmetic of memory: who holds what at a run's fullest moment.

use super::Probe;
use crate::{
    domain::{BaseInfo, MemoryEstimate, Training, spec::Optimizer},
    model::ops::scored_rows,
    trainer::{
        optim::{BLOCK, LEAST_8BIT},
        order,
        plan::Plan,
    },
};

const F32: u64 = 4;

/// Rows to look at for the largest micro-batch; beyond, the longest rows are taken together.
const MANY_ROWS: usize = 2_000_000;

/// `sizes` are those of the trained tensors; `train` and `valid` have the lengths of each row's texts.
pub fn memory(
    training: &Training,
    seed: u64,
    base: &BaseInfo,
    probe: &Probe,
    sizes: &[usize],
    [train, valid]: [&[Vec<usize>]; 2],
) -> MemoryEstimate {
    let batch = largest_batch(training, seed, train, valid);
    let (tokens, layers) = (batch.iter().sum::<usize>() as u64, base.layers.max(1) as u64);
    let n: u64 = sizes.iter().map(|n| *n as u64).sum();
    let (whole, row) = (probe.kept(&batch), tokens * base.hidden as u64 * F32);
    let (activations, parts) = if training.gradient_checkpointing {
        // The inputs, and one layer at a time.
        (layers * row + whole / layers + row, layers)
    } else {
        (whole, 1)
    };
    let scores = scored_rows(base.vocab).min(tokens as usize) * (base.vocab + 2 * base.hidden);
    // In the backward of a feed-forward block gradients of three of its inner rows are there at once, and two outer ones.
    let block = tokens * (3 * base.intermediate as u64 + 2 * base.hidden as u64);
    let mut found = MemoryEstimate {
        weights: n * F32,
        optimizer: sizes.iter().map(|n| moments(training.optimizer, *n as u64)).sum(),
        // The step's sum, and what one backward has found.
        gradients: n * F32 + n * F32 / parts,
        activations,
        workspace: (scores as u64 * F32 + row).max(block * F32),
        // Ids and labels.
        data: (train.iter().chain(valid).flatten().sum::<usize>() * 12) as u64,
        ..MemoryEstimate::default()
    };
    // The adapter's and the trainer's files, and the trainer's once more as it is read back.
    found.checkpoint = found.weights + 2 * (found.weights + found.optimizer);
    let step = found.gradients + found.activations + found.workspace;
    let held = found.weights + found.optimizer + found.data + step.max(found.checkpoint);
    found.peak = held + held / 10;
    found
}

fn moments(optimizer: Optimizer, n: u64) -> u64 {
    match optimizer {
        Optimizer::Adamw8bit if n >= LEAST_8BIT as u64 => 2 * (n + n.div_ceil(BLOCK as u64) * F32),
        _ => 2 * n * F32,
    }
}

/// The lengths of the texts in the micro-batch with the most tokens that the run will see.
fn largest_batch(training: &Training, seed: u64, train: &[Vec<usize>], valid: &[Vec<usize>]) -> Vec<usize> {
    let plan = Plan::new(training, train.len());
    let mut largest: Vec<usize> = Vec::new();
    let mut consider = |rows: &mut dyn Iterator<Item = &Vec<usize>>| {
        let batch: Vec<usize> = rows.flatten().copied().collect();
        if batch.iter().sum::<usize>() > largest.iter().sum() {
            largest = batch;
        }
    };
    valid.chunks(plan.batch_size).for_each(|rows| consider(&mut rows.iter()));
    let epochs = plan.total_steps.div_ceil(plan.steps_per_epoch.max(1));
    if (epochs as usize).saturating_mul(train.len()) > MANY_ROWS {
        let mut longest: Vec<&Vec<usize>> = train.iter().collect();
        longest.sort_by_key(|row| std::cmp::Reverse(row.iter().sum::<usize>()));
        consider(&mut longest.into_iter().take(plan.batch_size));
        return largest;
    }
    for epoch in 0..epochs {
        let order = order::epoch(seed, epoch, train.len());
        let first = epoch * plan.steps_per_epoch;
        for step in first..(first + plan.steps_per_epoch).min(plan.total_steps) {
            let places = &order[plan.rows_of(step).1];
            places.chunks(plan.batch_size).for_each(|rows| consider(&mut rows.iter().map(|row| &train[*row])));
        }
    }
    largest
}
