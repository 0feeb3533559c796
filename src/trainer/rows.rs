//! The rows that a run can use.

use super::{Run, TrainError, order};
use crate::{data::Row, domain::Observer};

pub struct Rows<'a> {
    pub train: Vec<&'a Row>,
    pub valid: Vec<&'a Row>,
    /// Of the training rows, how many `valid` has.
    pub held_out: usize,
}

impl<'a> Rows<'a> {
    /// Leaves out what cannot be trained on, and says how much; holds rows out for validation when the spec asks for
    /// it and no validation set is given.
    pub fn choose(run: &Run<'a>, observer: &mut dyn Observer) -> Result<Self, TrainError> {
        let training = &run.spec.training;
        let mut train = usable(run, run.train, "training", observer)?;
        let mut valid = usable(run, run.valid, "validation", observer)?;
        let mut held_out = 0;
        if run.valid.is_empty() && training.validation_split > 0.0 {
            let (kept, held) = order::holdout(run.spec.seed, training.validation_split, train.len());
            held_out = held.len();
            valid = held.into_iter().map(|row| train[row]).collect();
            train = kept.into_iter().map(|row| train[row]).collect();
        }
        if train.is_empty() {
            let text = format!("none of the {} training rows has tokens to train on", run.train.len());
            return Err(TrainError::Data(text));
        }
        if valid.is_empty() && training.early_stopping.is_some() {
            let text = "early stopping needs validation rows; there are none, so the run goes to its end";
            observer.message("warn", text).map_err(TrainError::Observer)?;
        }
        Ok(Self { train, valid, held_out })
    }
}

fn usable<'a>(run: &Run, rows: &'a [Row], set: &str, observer: &mut dyn Observer) -> Result<Vec<&'a Row>, TrainError> {
    let wanted = run.spec.objective.rows();
    if rows.iter().any(|row| row.kind() != wanted) {
        let text = format!("the {set} rows are not what {} reads: {}", run.spec.objective.type_name(), wanted.wanted());
        return Err(TrainError::Data(text));
    }
    let context = run.base.info.context.saturating_sub(run.spec.adapter.virtual_tokens());
    let room = run.spec.objective.draw().map_or(0, |draw| draw.max_completion_length as usize);
    let limit = (run.spec.training.max_seq_len as usize).min(context).saturating_sub(room);
    let (fitting, long): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.longest() <= limit);
    let (trained, idle): (Vec<_>, Vec<_>) = fitting.into_iter().partition(|row| row.is_trained());
    if let Some(labels) = run.spec.objective.labels() {
        check_labels(labels, &trained, set)?;
    }
    let reasons = [(long.len(), format!("longer than {limit} tokens")), (idle.len(), "without a trained token".into())];
    for (count, reason) in reasons.into_iter().filter(|(count, _)| *count > 0) {
        let text = format!("{count} of {} {set} rows are left out: {reason}", rows.len());
        observer.message("warn", &text).map_err(TrainError::Observer)?;
    }
    Ok(trained)
}

/// Every row's label has to be one of the head's.
fn check_labels(labels: &[String], rows: &[&Row], set: &str) -> Result<(), TrainError> {
    let marks = rows.iter().flat_map(|row| row.marks().iter().map(move |mark| (row, mark)));
    let Some((row, mark)) = marks.into_iter().find(|(_, mark)| !labels.contains(&mark.label)) else { return Ok(()) };
    let line = row.examples().map(|text| text.line).next().unwrap_or(0);
    let text = format!("{set} row of line {line}: {} is not one of {}", mark.label, labels.join(", "));
    Err(TrainError::Data(text))
}
