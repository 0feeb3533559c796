//! One training run.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::TrainSpec;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    ValidatingFiles,
    Queued,
    Running,
    Paused,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            JobStatus::ValidatingFiles => "validating_files",
            JobStatus::Queued => "queued",
            JobStatus::Running => "running",
            JobStatus::Paused => "paused",
            JobStatus::Succeeded => "succeeded",
            JobStatus::Failed => "failed",
            JobStatus::Cancelled => "cancelled",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        use JobStatus::*;
        [ValidatingFiles, Queued, Running, Paused, Succeeded, Failed, Cancelled]
            .into_iter()
            .find(|s| s.as_str() == text)
    }

    /// Nothing will change any more.
    pub fn is_final(self) -> bool {
        matches!(self, JobStatus::Succeeded | JobStatus::Failed | JobStatus::Cancelled)
    }
}

/// Why a job failed. The code's first word says whose fault it was:
/// `dataset_…` and `spec_…` the request's, `grader_…` that of who was asked for rewards, `out_of_memory` the machine's, `internal…` ours.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    pub code: String,
    pub message: String,
    /// The field of the request, where one is at fault.
    pub param: Option<String>,
}

/// A row of the jobs table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// `ftjob-…`
    pub id: String,
    pub project: String,
    /// Unix seconds.
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
    pub status: JobStatus,
    /// What a user asked for while the job ran: `pause` or `cancel`; the worker acts within one step.
    pub requested: Option<String>,
    /// The request's `model`: a base, or a tuned model that is continued.
    pub model: String,
    pub training_file: String,
    pub validation_file: Option<String>,
    pub spec: TrainSpec,
    pub priority: i64,
    /// The name that the result will have; its checkpoints' names begin with it.
    pub output_model: String,
    /// `output_model`, once succeeded.
    pub fine_tuned_model: Option<String>,
    pub trained_tokens: Option<i64>,
    pub result_files: Vec<String>,
    pub error: Option<Failure>,
    pub metadata: Option<serde_json::Value>,
    /// The number of the current attempt; every write of a worker carries it.
    pub fence: i64,
    /// Attempts in a row that ended without a new step or checkpoint.
    pub barren_attempts: i64,
    /// Estimated end, unix seconds.
    pub estimated_finish: Option<i64>,
}
