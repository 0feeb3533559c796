//! Next-token cross entropy over the trained tokens.

use candle_core::Result;

use super::{Figures, Found, Models, Objective, Term};
use crate::{
    data::{Example, Row},
    domain::spec::SupervisedSpec,
    model::{Batch, Sequence, Target},
};

impl Objective for SupervisedSpec {
    /// Trained tokens.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        vec![rows.iter().map(|row| row.trained()).sum::<usize>() as f64]
    }

    /// `packing` asks for rows one behind another; that is how every batch is laid out, without padding, so the losses
    /// do not depend on it.
    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        let texts: Vec<&Example> = rows.iter().flat_map(|row| row.examples()).collect();
        let hook = models.method.hook(models.train)?;
        let sequences = texts
            .iter()
            .map(|text| Sequence { tokens: &text.ids, branches: &[], hook: Some(hook.clone()), cache: None })
            .collect();
        let hidden = models.forward(Batch { sequences, train: models.train })?;
        let targets = targets(texts.iter().map(|text| text.labels.as_slice()));
        let found = models.base.cross_entropy(&hidden, &targets, Some(hook.as_ref()))?;
        let term = Term { value: f64::from(found.loss.to_scalar::<f32>()?), gradient: found.loss };
        let hits = Some((found.correct, targets.len()));
        Ok(Found { terms: vec![term], figures: Figures::default(), hits, hook })
    }
}

/// The trained positions of rows that stand one behind another, each given by its labels: the hidden row of position
/// `i` predicts the label of `i + 1`. Position 0 is never a target. Each weighs 1; the trainer divides by the tokens
/// of the whole step.
pub fn targets<'a>(rows: impl IntoIterator<Item = &'a [Option<u32>]>) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut start = 0;
    for labels in rows {
        let trained = labels.iter().enumerate().skip(1);
        targets.extend(
            trained
                .filter_map(|(place, label)| label.map(|token| Target { row: start + place - 1, token, weight: 1.0 })),
        );
        start += labels.len();
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_starts_anew() {
        let rows: [&[Option<u32>]; 2] = [&[Some(4), None, Some(5)], &[Some(6), Some(8)]];
        let found: Vec<(usize, u32)> = targets(rows).iter().map(|t| (t.row, t.token)).collect();
        assert_eq!(found, [(1, 5), (3, 8)]);
    }
}
