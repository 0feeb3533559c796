//! Which rows come when: pure functions of the seed.

use crate::domain::rng::{Stream, key};

/// Streams of the run's seed. Methods use `seed` itself for their first values.
const ORDER: u64 = 1;
const DROPOUT: u64 = 2;
const HOLDOUT: u64 = 3;
const ROLLOUT: u64 = 4;

/// The rows of an epoch, shuffled (Fisher and Yates).
pub fn epoch(seed: u64, epoch: u64, rows: usize) -> Vec<usize> {
    shuffled(Stream::new(key(seed, &[ORDER]), epoch), rows)
}

/// The key of a forward pass's random numbers.
pub fn pass_key(seed: u64, step: u64, micro_batch: u64) -> u64 {
    key(seed, &[DROPOUT, step, micro_batch])
}

/// The seed of one completion of a step.
pub fn rollout_key(seed: u64, step: u64, completion: u64) -> u64 {
    key(seed, &[ROLLOUT, step, completion])
}

/// `(training, held out)` rows, each in the file's order. At least one row stays on each side, if there are two.
pub fn holdout(seed: u64, share: f64, rows: usize) -> (Vec<usize>, Vec<usize>) {
    let held = held_out(share, rows);
    let order = shuffled(Stream::new(key(seed, &[HOLDOUT]), 0), rows);
    let (mut valid, mut train) = (order[..held].to_vec(), order[held..].to_vec());
    valid.sort_unstable();
    train.sort_unstable();
    (train, valid)
}

/// How many rows `holdout` takes.
pub fn held_out(share: f64, rows: usize) -> usize {
    let wanted = (share * rows as f64).round() as usize;
    if share > 0.0 && rows > 1 { wanted.clamp(1, rows - 1) } else { 0 }
}

fn shuffled(stream: Stream, rows: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..rows).collect();
    for last in (1..rows).rev() {
        let other = stream.below(last as u64, last as u64 + 1) as usize;
        order.swap(last, other);
    }
    order
}
