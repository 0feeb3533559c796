//! The validation set: cross entropy and accuracy per trained token.

use std::sync::Arc;

use super::{TrainError, pass::cross_entropy};
use crate::{
    data::Example,
    domain::Metrics,
    model::{Base, Hook},
};

/// Fills in the validation figures, over the whole set and over its first batch. Each token weighs the same, however
/// the rows are batched.
pub fn evaluate(
    base: &Base,
    hook: &Arc<dyn Hook>,
    rows: &[&Example],
    batch_size: usize,
    metrics: &mut Metrics,
) -> Result<(), TrainError> {
    let (mut loss, mut correct, mut tokens) = (0.0, 0, 0);
    for (i, batch) in rows.chunks(batch_size).enumerate() {
        let found = cross_entropy(base, hook, batch, None)?;
        loss += f64::from(found.loss.to_scalar::<f32>()?);
        correct += found.correct;
        tokens += batch.iter().map(|row| row.trained()).sum::<usize>();
        let so_far = (Some(loss / tokens as f64), Some(correct as f64 / tokens as f64));
        if i == 0 {
            (metrics.valid_loss, metrics.valid_mean_token_accuracy) = so_far;
        }
        (metrics.full_valid_loss, metrics.full_valid_mean_token_accuracy) = so_far;
    }
    Ok(())
}
