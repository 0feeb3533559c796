//! How the learning rate goes. The shapes are those of Hugging Face's `get_scheduler`, so that runs compare.

use crate::domain::{Training, spec::Schedule};

/// The learning rate of an optimiser step, from 0. With warm-up, step 0 has rate 0.
pub fn learning_rate(training: &Training, step: u64, total: u64) -> f64 {
    let warmup = (training.warmup_ratio * total as f64).ceil() as u64;
    let factor = if step < warmup {
        step as f64 / warmup as f64
    } else {
        let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match training.lr_scheduler {
            Schedule::Constant => 1.0,
            Schedule::Linear => (1.0 - progress).max(0.0),
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
        }
    };
    training.learning_rate * factor
}
