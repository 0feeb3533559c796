//! What texts and words are called: cross entropy of a linear layer over the hidden row that speaks for each.
//!
//! `−log softmax(h Wᵀ + b)[label]`, a mean over the texts or words of a step.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::{Figures, Found, Models, Objective, Term};
use crate::{
    data::{Example, Row},
    domain::{
        ObjectiveSpec, TaskHead,
        spec::{SequenceClassificationSpec, TokenClassificationSpec},
    },
    model::{Batch, Sequence},
};

impl Objective for SequenceClassificationSpec {
    /// Texts.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        vec![rows.len() as f64]
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        classify(ObjectiveSpec::SequenceClassification(self.clone()).head(), models, rows)
    }
}

impl Objective for TokenClassificationSpec {
    /// Words.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        vec![rows.iter().map(|row| row.marks().len()).sum::<usize>() as f64]
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        classify(ObjectiveSpec::TokenClassification(self.clone()).head(), models, rows)
    }
}

fn classify(head: Option<TaskHead>, models: &Models, rows: &[&Row]) -> Result<Found> {
    let Some(head) = head else { candle_core::bail!("an objective without a head cannot classify") };
    let texts: Vec<&Example> = rows.iter().flat_map(|row| row.examples()).collect();
    let hook = models.method.hook(models.train)?;
    let sequences =
        texts.iter().map(|text| Sequence { tokens: &text.ids, branches: &[], hook: Some(hook.clone()), cache: None });
    let hidden = models.forward(Batch { sequences: sequences.collect(), train: models.train })?;
    let (mut places, mut wanted, mut start) = (Vec::new(), Vec::new(), 0);
    for (row, text) in rows.iter().zip(&texts) {
        for mark in row.marks() {
            let Some(label) = head.labels().iter().position(|label| *label == mark.label) else {
                candle_core::bail!("{} is none of the head's labels", mark.label);
            };
            places.push((start + head.place(&mark.tokens)) as u32);
            wanted.push(label);
        }
        start += text.ids.len();
    }
    let chosen = hidden.index_select(&Tensor::new(places, hidden.device())?, 0)?;
    let logits = models.base.logits(&chosen, Some(hook.as_ref()))?;
    let (mut value, mut slopes, mut said) = (0.0, Vec::with_capacity(logits.elem_count()), Vec::new());
    for (scores, label) in logits.to_vec2::<f32>()?.iter().zip(&wanted) {
        let (loss, slope) = cross_entropy(scores, *label);
        value += loss;
        slopes.extend(slope);
        said.push(best(scores));
    }
    let gradient = (&logits * Tensor::from_vec(slopes, logits.shape(), logits.device())?)?.sum_all()?;
    let correct = said.iter().zip(&wanted).filter(|(said, wanted)| said == wanted).count();
    let mut figures = Figures::default();
    said.iter().zip(&wanted).for_each(|(said, wanted)| figures.add("accuracy", f64::from(u8::from(said == wanted))));
    let mut first = 0;
    for row in rows {
        let words = first..first + row.marks().len();
        first = words.end;
        let named = |labels: &[usize]| labels.iter().map(|label| head.labels()[*label].as_str()).collect::<Vec<_>>();
        match is_chunked(head.labels()) {
            true => tally_entities(&mut figures, &named(&said[words.clone()]), &named(&wanted[words])),
            false => tally_labels(&mut figures, &named(&said[words.clone()]), &named(&wanted[words])),
        }
    }
    Ok(Found { terms: vec![Term { value, gradient }], figures, hits: Some((correct, wanted.len())), hook })
}

/// The loss of one row of scores, and its slopes.
fn cross_entropy(scores: &[f32], label: usize) -> (f64, Vec<f32>) {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = scores.iter().map(|score| f64::from(score - highest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let loss = sum.ln() - f64::from(scores[label] - highest);
    let slope = |(i, weight): (usize, &f64)| (weight / sum - f64::from(u8::from(i == label))) as f32;
    (loss, weights.iter().enumerate().map(slope).collect())
}

/// The highest score; the first among equals.
fn best(scores: &[f32]) -> usize {
    let highest = scores.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
    highest.map_or(0, |(label, _)| label)
}

/// Whether tags say where an entity begins: `B-PER`, `I-PER`, `O`.
fn is_chunked(labels: &[String]) -> bool {
    let is_part = |label: &String| label.starts_with("B-") || label.starts_with("I-");
    labels.iter().any(is_part) && labels.iter().all(|label| is_part(label) || label == "O")
}

/// F1 is then the mean over the labels.
fn tally_labels(figures: &mut Figures, said: &[&str], wanted: &[&str]) {
    for (said, wanted) in said.iter().zip(wanted) {
        figures.tally(said, [said == wanted, true, false]);
        figures.tally(wanted, [false, false, true]);
    }
}

/// F1 is then that of whole entities: the same words and the same kind (CoNLL's measure).
fn tally_entities(figures: &mut Figures, said: &[&str], wanted: &[&str]) {
    let (said, wanted) = (entities(said), entities(wanted));
    said.iter().for_each(|entity| figures.tally("entities", [wanted.contains(entity), true, false]));
    wanted.iter().for_each(|_| figures.tally("entities", [false, false, true]));
}

/// Runs of one kind. `I-` behind another kind, or behind none, begins one too, as conlleval has it.
fn entities<'a>(tags: &[&'a str]) -> Vec<(&'a str, Range<usize>)> {
    let mut found: Vec<(&str, Range<usize>)> = Vec::new();
    for (i, tag) in tags.iter().enumerate() {
        let Some((part, kind)) = tag.split_once('-') else { continue };
        match found.last_mut().filter(|(last, words)| part == "I" && *last == kind && words.end == i) {
            Some((_, words)) => words.end = i + 1,
            None => found.push((kind, i..i + 1)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_loss() {
        let (scores, h) = ([0.4f32, -1.3, 2.1, 0.0], 1e-3f32);
        for label in 0..4 {
            let (_, slopes) = cross_entropy(&scores, label);
            for i in 0..4 {
                let at = |x: f32| {
                    let mut moved = scores;
                    moved[i] += x;
                    cross_entropy(&moved, label).0
                };
                let slope = (at(h) - at(-h)) / f64::from(2.0 * h);
                assert!((slope - f64::from(slopes[i])).abs() < 1e-3, "{label} {i}: {slope} {}", slopes[i]);
            }
        }
        assert!((cross_entropy(&[0.0; 4], 2).0 - 4f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn entities_are_runs_of_one_kind() {
        let tags = ["O", "B-A", "I-A", "B-A", "I-B", "I-B", "O", "I-A"];
        assert_eq!(entities(&tags), [("A", 1..3), ("A", 3..4), ("B", 4..6), ("A", 7..8)]);
    }

    #[test]
    fn f1_is_of_entities_or_of_labels() {
        let (said, wanted) = (["B-A", "I-A", "O", "B-A", "O"], ["B-A", "I-A", "O", "B-A", "B-A"]);
        let mut figures = Figures::default();
        tally_entities(&mut figures, &said, &wanted);
        assert!((figures.means()["f1"] - 0.8).abs() < 1e-12, "{figures:?}");
        let (said, wanted) = (["a", "a", "b", "c"], ["a", "b", "b", "b"]);
        let mut figures = Figures::default();
        tally_labels(&mut figures, &said, &wanted);
        // a: 2/3, b: 1/2, c: said once and never right.
        assert!((figures.means()["f1"] - (2.0 / 3.0 + 0.5 + 0.0) / 3.0).abs() < 1e-12, "{figures:?}");
    }
}
