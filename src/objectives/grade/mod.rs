//! Graders: a text and the row that its prompt came from become a number.

mod formula;
mod similarity;

use std::collections::BTreeMap;

use regex::{Captures, Regex};
use serde_json::{Value, json};

use crate::domain::spec::{Comparison, Grader};

pub use formula::Formula;

/// Why there is no number: names what is at fault.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct GradeError(pub String);

/// What templates speak of.
pub struct Scene {
    values: Value,
}

impl Scene {
    /// `item` is the dataset's row; `text` is what the model wrote.
    pub fn new(item: &Value, text: &str) -> Self {
        let parsed: Option<Value> = serde_json::from_str(text).ok();
        Self { values: json!({"item": item, "sample": {"output_text": text, "output_json": parsed}}) }
    }

    /// The template with its places filled in. A place that is not there is an error.
    fn fill(&self, template: &str) -> Result<String, GradeError> {
        let place = Regex::new(r"\{\{\s*([^{}\s]+)\s*\}\}").map_err(|error| GradeError(error.to_string()))?;
        let mut missing = None;
        let filled = place.replace_all(template, |found: &Captures| {
            let pointer = format!("/{}", found[1].replace('.', "/"));
            match self.values.pointer(&pointer) {
                Some(Value::String(text)) => text.clone(),
                // What the model did not write is nothing, and no fault of the grader.
                Some(Value::Null) => String::new(),
                Some(other) => other.to_string(),
                None if pointer.starts_with("/sample/output_json") => String::new(),
                None => {
                    missing.get_or_insert(found[1].to_owned());
                    String::new()
                }
            }
        });
        match missing {
            None => Ok(filled.into_owned()),
            Some(name) => Err(GradeError(format!("{{{{{name}}}}} names nothing in the row"))),
        }
    }
}

pub fn grade(grader: &Grader, scene: &Scene) -> Result<f64, GradeError> {
    let yes = |is: bool| f64::from(u8::from(is));
    match grader {
        Grader::StringCheck { input, reference, operation, .. } => {
            let (input, reference) = (scene.fill(input)?, scene.fill(reference)?);
            Ok(yes(match operation {
                Comparison::Eq => input == reference,
                Comparison::Ne => input != reference,
                Comparison::Like => input.contains(&reference),
                Comparison::Ilike => input.to_lowercase().contains(&reference.to_lowercase()),
            }))
        }
        Grader::TextSimilarity { input, reference, evaluation_metric, .. } => {
            Ok(similarity::similarity(*evaluation_metric, &scene.fill(input)?, &scene.fill(reference)?))
        }
        Grader::Regex { input, pattern, .. } => {
            let pattern = Regex::new(pattern).map_err(|error| GradeError(error.to_string()))?;
            Ok(yes(pattern.is_match(&scene.fill(input)?)))
        }
        Grader::JsonValid { input, .. } => Ok(yes(serde_json::from_str::<Value>(&scene.fill(input)?).is_ok())),
        Grader::Length { input, least, most, .. } => {
            Ok(yes((*least..=*most).contains(&(scene.fill(input)?.chars().count() as u64))))
        }
        Grader::Multi { graders, calculate_output, .. } => {
            let scores = graders.iter().map(|(key, grader)| Ok((key.clone(), grade(grader, scene)?)));
            let scores: BTreeMap<String, f64> = scores.collect::<Result<_, GradeError>>()?;
            Formula::parse(calculate_output)?.value(&scores)
        }
    }
}

/// What can be said of a grader before any completion: its formulas, and which names they use.
pub fn check(grader: &Grader) -> Result<(), GradeError> {
    let Grader::Multi { graders, calculate_output, .. } = grader else { return Ok(()) };
    graders.values().try_for_each(check)?;
    let ones = graders.keys().map(|key| (key.clone(), 1.0)).collect();
    Formula::parse(calculate_output)?.value(&ones).map(|_| ())
}
