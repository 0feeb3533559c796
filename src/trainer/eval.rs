//! The validation set: the objective's loss, accuracy per trained token, and its figures.

use super::TrainError;
use crate::{
    data::Row,
    domain::Metrics,
    objectives::{Figures, Models, Objective},
};

/// Fills in the validation figures, over the whole set and over its first batch. Each unit of the loss weighs the
/// same, however the rows are batched.
pub fn evaluate(
    objective: &dyn Objective,
    models: &Models,
    rows: &[&Row],
    batch_size: usize,
    metrics: &mut Metrics,
) -> Result<(), TrainError> {
    let (mut sums, mut figures) = (Vec::<(f64, f64)>::new(), Figures::default());
    let (mut correct, mut trained) = (0, 0);
    for (i, batch) in rows.chunks(batch_size).enumerate() {
        let found = objective.pass(models, batch)?;
        models.tape.borrow_mut().clear();
        let counts = objective.counts(batch);
        sums.resize(counts.len(), (0.0, 0.0));
        for ((sum, units), (term, count)) in sums.iter_mut().zip(found.terms.iter().zip(counts)) {
            *sum += term.value;
            *units += count;
        }
        figures.merge(found.figures);
        let loss = Some(sums.iter().map(|(sum, units)| sum / units).sum());
        let accuracy = found.hits.map(|(hits, of)| {
            correct += hits;
            trained += of;
            correct as f64 / trained as f64
        });
        if i == 0 {
            (metrics.valid_loss, metrics.valid_mean_token_accuracy) = (loss, accuracy);
        }
        (metrics.full_valid_loss, metrics.full_valid_mean_token_accuracy) = (loss, accuracy);
    }
    metrics.figures.extend(figures.means().into_iter().map(|(name, mean)| (format!("eval_{name}"), mean)));
    Ok(())
}
