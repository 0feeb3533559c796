//! Labelling pairs of answers: who answers, who is asked which answer is better, and what came of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{Failure, JobStatus, spec::Grader};

/// A background task that makes a dataset of pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Labelling {
    /// `pref-…`
    pub id: String,
    pub project: String,
    /// Unix seconds.
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
    pub status: JobStatus,
    pub spec: LabelSpec,
    /// A worker needs it; empty where nobody here is asked.
    pub base: String,
    /// Rows of the file, and those that are through.
    pub total: i64,
    pub done: i64,
    pub report: Option<LabelReport>,
    pub result_file: Option<String>,
    pub error: Option<Failure>,
    pub metadata: Option<Value>,
    /// The number of the current attempt; every write of a worker carries it.
    pub fence: i64,
    /// Attempts in a row that ended without a row.
    pub barren_attempts: i64,
}

/// What was asked for, every default filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LabelSpec {
    /// Who answers the prompts; null where the file brings the answers.
    pub model: Option<String>,
    pub file: String,
    pub judge: PairJudge,
    /// By what a model judges.
    pub criteria: Vec<String>,
    pub sampling: AnswerSampling,
    pub min_margin: f64,
    pub max_dropped: f64,
}

/// How the answers to a prompt are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AnswerSampling {
    /// Above 0, to 2. Default 1.
    pub temperature: f64,
    /// Above 0, to 1. Default 1.
    pub top_p: f64,
    /// Default 256.
    pub max_completion_tokens: u64,
    /// Default 42. The same seed, the same answers.
    pub seed: u64,
}

impl Default for AnswerSampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, max_completion_tokens: 256, seed: 42 }
    }
}

/// Who says which of two answers is better.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum PairJudge {
    /// A model that reads both, once in each order.
    Model {
        /// A base or a tuned model of this server; with `endpoint`, a model there.
        model: String,
        /// The address of an OpenAI-compatible server, up to `/v1`. Its key is a setting of this server.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
    },
    /// A grader that scores each answer: the higher score is better.
    Grader { grader: Grader },
}

/// What became of one row of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Labelled {
    pub outcome: Outcome,
    /// That the first answer is the better one: as it was shown first, and as it was shown second.
    pub orders: Option<[f64; 2]>,
    /// Tokens read and written, by the name of the model.
    pub spent: BTreeMap<String, (u64, u64)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A row of the dataset.
    Row(Value),
    /// Why there is none, with what was said of it.
    Dropped(Dropped, Option<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dropped {
    /// Both answers were the same, however often another was asked for.
    EqualAnswers,
    /// An answer is empty.
    EmptyAnswer,
    /// Neither answer is better by as much as was wanted.
    Undecided,
    /// The prompt could not be answered.
    Unanswered,
    /// The judge did not answer, or answered nonsense.
    Unjudged,
}

/// What a task made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LabelReport {
    /// Rows of the dataset.
    pub rows: u64,
    /// Rows of the file that gave none, by why: `equal_answers`, `empty_answer`, `undecided`, `unanswered`, `unjudged`.
    pub dropped: BTreeMap<String, u64>,
    /// Of the pairs that were judged, the share whose answer did not depend on which was shown first.
    pub agreement: Option<f64>,
    /// The mean probability that the judge gives to whatever is shown first; 0.5 is without bias.
    pub first_shown: Option<f64>,
    /// The mean probability of the labels.
    pub certainty: Option<f64>,
    /// What it cost, by the name of the model.
    pub usage: BTreeMap<String, LabelUsage>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LabelUsage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

impl Dropped {
    pub fn name(self) -> &'static str {
        match self {
            Dropped::EqualAnswers => "equal_answers",
            Dropped::EmptyAnswer => "empty_answer",
            Dropped::Undecided => "undecided",
            Dropped::Unanswered => "unanswered",
            Dropped::Unjudged => "unjudged",
        }
    }

    /// Somebody who was asked is at fault: these count against `max_dropped`.
    pub fn is_fault(self) -> bool {
        matches!(self, Dropped::Unanswered | Dropped::Unjudged)
    }
}

impl LabelReport {
    pub fn of(all: &[Labelled]) -> Self {
        let mut report = Self::default();
        let (mut agreed, mut first, mut certain, mut judged) = (0.0, 0.0, 0.0, 0.0);
        for one in all {
            match &one.outcome {
                Outcome::Row(_) => report.rows += 1,
                Outcome::Dropped(why, _) => *report.dropped.entry(why.name().to_owned()).or_default() += 1,
            }
            for (model, (read, written)) in &one.spent {
                let usage = report.usage.entry(model.clone()).or_default();
                usage.prompt_tokens += read;
                usage.completion_tokens += written;
            }
            if let Some([shown_first, shown_second]) = one.orders {
                judged += 1.0;
                agreed += f64::from(u8::from((shown_first > 0.5) == (shown_second > 0.5)));
                first += 0.5 + (shown_first - shown_second) / 2.0;
                let mean = (shown_first + shown_second) / 2.0;
                certain += mean.max(1.0 - mean);
            }
        }
        let mean = |sum: f64| (judged > 0.0).then(|| sum / judged);
        (report.agreement, report.first_shown, report.certainty) = (mean(agreed), mean(first), mean(certain));
        report
    }
}
