//! The validation set: cross entropy and accuracy per trained token.

use super::{TrainError, pass::cross_entropy};
use crate::{data::Example, domain::Metrics, methods::Trainable, model::Base};

/// Fills in the validation figures, over the whole set and over its first batch. Each token weighs the same, however
/// the rows are batched.
pub fn evaluate(
    base: &Base,
    method: &dyn Trainable,
    rows: &[&Example],
    batch_size: usize,
    metrics: &mut Metrics,
) -> Result<(), TrainError> {
    let (mut loss, mut correct, mut tokens) = (0.0, 0, 0);
    for (i, batch) in rows.chunks(batch_size).enumerate() {
        let found = cross_entropy(base, &method.hook(None)?, batch, None)?;
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
