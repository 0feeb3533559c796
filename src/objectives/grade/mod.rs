//! Graders: a text and the row that its prompt came from become a number. What others have to be asked for is asked
//! elsewhere, and comes here as answers.

mod formula;
mod similarity;

use std::collections::BTreeMap;

use regex::{Captures, Regex};
use serde_json::{Value, json};

use crate::domain::spec::{Comparison, Grader, GraderMessage, ScoreModel, below_key};

pub use formula::Formula;

/// Why there is no number: names what is at fault.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct GradeError(pub String);

/// What those said who were asked, by their places (`Grader::asked`).
pub type Answers = BTreeMap<String, f64>;

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

    /// The row and what the model wrote, as templates name them.
    pub fn values(&self) -> &Value {
        &self.values
    }

    /// The row's conversation with what the model wrote behind it, as a row of a training file.
    pub fn conversation(&self) -> Result<Value, GradeError> {
        let Some(Value::Array(messages)) = self.values.pointer("/item/messages") else {
            return Err(GradeError("a reward model reads conversations: the row has no messages".to_owned()));
        };
        let mut messages = messages.clone();
        messages.push(json!({"role": "assistant", "content": self.values["sample"]["output_text"]}));
        Ok(json!({"messages": messages}))
    }

    /// What a model is asked, as a conversation.
    pub fn question(&self, asked: &ScoreModel) -> Result<Vec<Value>, GradeError> {
        let message = |message: &GraderMessage| {
            let content = self.fill(&message.text().map_err(GradeError)?)?;
            Ok(json!({"role": message.role.name(), "content": content}))
        };
        asked.input.iter().map(message).collect()
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

/// A grader that asks nobody.
pub fn grade(grader: &Grader, scene: &Scene) -> Result<f64, GradeError> {
    grade_with(grader, scene, &Answers::new())
}

/// With the answers of all that were asked. What a formula gives may be no number.
pub fn grade_with(grader: &Grader, scene: &Scene, answers: &Answers) -> Result<f64, GradeError> {
    grade_at("", grader, scene, answers)
}

/// Of each grader inside a multi grader, by its key, those that have a score.
pub fn parts(grader: &Grader, scene: &Scene, answers: &Answers) -> Vec<(String, f64)> {
    let Grader::Multi { graders, .. } = grader else { return Vec::new() };
    let part = |(key, inner): (&String, &Grader)| Some((key.clone(), grade_at(key, inner, scene, answers).ok()?));
    graders.iter().filter_map(part).filter(|(_, score)| score.is_finite()).collect()
}

fn grade_at(place: &str, grader: &Grader, scene: &Scene, answers: &Answers) -> Result<f64, GradeError> {
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
        Grader::ScoreModel(_) | Grader::Endpoint(_) | Grader::RewardModel(_) => {
            answers.get(place).copied().ok_or_else(|| GradeError(format!("nobody has answered {place:?}")))
        }
        Grader::Multi { graders, calculate_output, .. } => {
            let score = |(key, inner): (&String, &Grader)| {
                Ok((key.clone(), grade_at(&below_key(place, key), inner, scene, answers)?))
            };
            let scores = graders.iter().map(score);
            let scores: BTreeMap<String, f64> = scores.collect::<Result<_, GradeError>>()?;
            // `min` and `max` would pass over it.
            if scores.values().any(|score| score.is_nan()) {
                return Ok(f64::NAN);
            }
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
