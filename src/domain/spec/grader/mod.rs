//! What gives a completion its reward: OpenAI's graders, rules, and services.

mod asked;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::SpecError;

pub use asked::{Endpoint, GraderMessage, GraderRole, RewardModel, SamplingParams, ScoreModel, Scoring};

/// How deep graders may stand in each other.
const DEPTH: usize = 2;

/// A grader, by its `type`. Texts may hold `{{sample.output_text}}`, `{{sample.output_json.field}}` and
/// `{{item.field}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Grader {
    /// 1 where the texts compare so, else 0.
    StringCheck { name: String, input: String, reference: String, operation: Comparison },
    /// How alike the texts are, 0 to 1.
    TextSimilarity { name: String, input: String, reference: String, evaluation_metric: Similarity },
    /// 1 where the pattern is found in the text, else 0.
    Regex { name: String, input: String, pattern: String },
    /// 1 where the text is JSON, else 0.
    JsonValid { name: String, input: String },
    /// 1 where the text has so many characters, else 0.
    Length { name: String, input: String, least: u64, most: u64 },
    /// A model's opinion. An answer that cannot be used is asked for three times, then left out and counted.
    ScoreModel(ScoreModel),
    /// A service's opinion, as often.
    Endpoint(Endpoint),
    /// A reward model's score.
    RewardModel(RewardModel),
    /// A formula over other graders' scores, by their keys.
    Multi {
        name: String,
        /// A grader by each key. Generated clients know no type that holds itself.
        #[schema(value_type = serde_json::Value)]
        graders: BTreeMap<String, Grader>,
        calculate_output: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Comparison {
    Eq,
    Ne,
    /// The input holds the reference.
    Like,
    /// The same, whatever the case.
    Ilike,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Similarity {
    FuzzyMatch,
    #[serde(rename = "rouge_1")]
    Rouge1,
    #[serde(rename = "rouge_2")]
    Rouge2,
    #[serde(rename = "rouge_3")]
    Rouge3,
    #[serde(rename = "rouge_4")]
    Rouge4,
    #[serde(rename = "rouge_5")]
    Rouge5,
    RougeL,
}

impl Grader {
    /// What can be said without a completion; `path` is where the grader stands in the request.
    pub fn check(&self, path: &str) -> Result<(), SpecError> {
        self.check_at(path, DEPTH)
    }

    fn check_at(&self, path: &str, depth: usize) -> Result<(), SpecError> {
        let wrong = |field: &str, message: String| {
            let param = format!("{path}.{field}");
            Err(SpecError::new(param.clone(), "spec_invalid_grader", format!("{param}: {message}")))
        };
        match self {
            Grader::Regex { pattern, .. } => match regex::Regex::new(pattern) {
                Ok(_) => Ok(()),
                Err(_) => wrong("pattern", format!("{pattern} is not a regular expression")),
            },
            Grader::Length { least, most, .. } if least > most => {
                wrong("least", format!("{least} is above most, which is {most}"))
            }
            Grader::Multi { .. } if depth == 0 => {
                wrong("type", format!("multi graders stand in each other more than {DEPTH} deep"))
            }
            Grader::Multi { graders, .. } => {
                if !(1..=16).contains(&graders.len()) {
                    return wrong("graders", format!("there are {}; it takes 1 to 16", graders.len()));
                }
                graders
                    .iter()
                    .try_for_each(|(key, grader)| grader.check_at(&format!("{path}.graders.{key}"), depth - 1))
            }
            Grader::ScoreModel(model) => model.check().or_else(|(field, why)| wrong(&field, why)),
            _ => Ok(()),
        }
    }

    /// Itself or, of a multi grader, those inside that ask somebody, each by its keys joined by dots.
    pub fn asked(&self) -> Vec<(String, Asked<'_>)> {
        match self {
            Grader::ScoreModel(model) => vec![(String::new(), Asked::Model(model))],
            Grader::Endpoint(endpoint) => vec![(String::new(), Asked::Endpoint(endpoint))],
            Grader::RewardModel(model) => vec![(String::new(), Asked::Reward(model))],
            Grader::Multi { graders, .. } => {
                let mut all = Vec::new();
                for (key, grader) in graders {
                    let below = grader.asked().into_iter();
                    all.extend(below.map(|(rest, one)| (below_key(key, &rest), one)));
                }
                all
            }
            _ => Vec::new(),
        }
    }
}

/// Who is asked.
#[derive(Clone, Copy, Debug)]
pub enum Asked<'a> {
    Model(&'a ScoreModel),
    Endpoint(&'a Endpoint),
    Reward(&'a RewardModel),
}

/// A grader's place: the keys that lead to it.
pub fn below_key(key: &str, rest: &str) -> String {
    let keys: Vec<&str> = [key, rest].into_iter().filter(|key| !key.is_empty()).collect();
    keys.join(".")
}
