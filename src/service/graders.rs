//! Graders tried before a job is paid for.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Problem, Service, fields::read};
use crate::{
    domain::spec::Grader,
    objectives::grade::{self, GradeError, Scene},
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Validate {
    grader: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    grader: Value,
    item: Option<Value>,
    model_sample: String,
}

/// What a grader said of one text.
pub struct Graded {
    pub grader: Grader,
    pub reward: Result<f64, GradeError>,
    /// Of each grader inside a multi grader, by its key.
    pub parts: Vec<(String, f64)>,
}

impl Service {
    /// The grader as it was understood.
    pub fn validate_grader(&self, body: Map<String, Value>) -> Result<Grader, Problem> {
        let body: Validate = read(body)?;
        grader(body.grader)
    }

    /// Grades one text.
    pub fn run_grader(&self, body: Map<String, Value>) -> Result<Graded, Problem> {
        let body: Run = read(body)?;
        let grader = grader(body.grader)?;
        let scene = Scene::new(&body.item.unwrap_or_default(), &body.model_sample);
        let parts = match &grader {
            Grader::Multi { graders, .. } => graders
                .iter()
                .filter_map(|(key, grader)| Some((key.clone(), grade::grade(grader, &scene).ok()?)))
                .collect(),
            _ => Vec::new(),
        };
        Ok(Graded { reward: grade::grade(&grader, &scene), grader, parts })
    }
}

fn grader(value: Value) -> Result<Grader, Problem> {
    let wrong = |message: String| Problem::invalid("grader", "spec_invalid_grader", message);
    let grader: Grader = serde_json::from_value(value).map_err(|error| wrong(format!("grader: {error}")))?;
    grader.check("grader")?;
    grade::check(&grader).map_err(|error| wrong(error.to_string()))?;
    Ok(grader)
}
