//! What is said of a dataset before it is used.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an objective reads of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKind {
    /// Texts to learn.
    Examples,
    /// A better and a worse answer to the same prompt.
    Pairs,
    /// Answers with a thumb up or down.
    Judged,
    /// Questions to answer, with whatever a grader needs.
    Prompts,
    /// Texts with what they are called.
    Labelled,
    /// Words, each with what it is called.
    Tagged,
}

impl RowKind {
    /// What a user has to write, in words.
    pub fn wanted(self) -> &'static str {
        match self {
            RowKind::Examples => "rows to learn: messages, or prompt and completion",
            RowKind::Pairs => "pairs: input, preferred_output and non_preferred_output, or prompt, chosen and rejected",
            RowKind::Prompts => "prompts: messages that end with the user's, and the fields that the grader names",
            RowKind::Judged => "judged answers: prompt, completion and label",
            RowKind::Labelled => "labelled texts: text and label",
            RowKind::Tagged => "tagged words: tokens and tags",
        }
    }
}

/// A line that cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LineError {
    /// From 1.
    pub line: u64,
    /// A stable code: `invalid_json`, `invalid_utf8`, `line_too_long`, `unknown_format`, `mixed_formats`,
    /// `missing_assistant`, `invalid_message`, `no_trained_tokens`, `too_long` …
    pub code: String,
    pub message: String,
}

/// A count of rows whose length in tokens lies in `[from, to)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HistogramBin {
    pub from: u64,
    pub to: u64,
    pub rows: u64,
}

/// One row as the model will see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RenderedExample {
    pub line: u64,
    /// The whole text after the chat template.
    pub text: String,
    /// The parts of it that are trained on; of labelled rows, the labels.
    pub trained_text: Vec<String>,
    pub tokens: u64,
    pub trained_tokens: u64,
}

/// How often a label or tag is in the rows that a job can train on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LabelCount {
    pub label: String,
    /// Texts, or words.
    pub count: u64,
    /// The line where it is first.
    pub first_line: u64,
}

/// `GET /v1/files/{id}/report`. Token counts are exact for the named base.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileReport {
    /// Always `file.report`.
    pub object: String,
    pub file_id: String,
    /// The base whose template and tokenizer were used.
    pub model: String,
    /// `chat`, `prompt_completion`, `tokens`, `alpaca`, `sharegpt`, `preference`, `unpaired_preference`,
    /// `reinforcement`, `labelled_text`, `tagged_tokens`, or null when no line could be read.
    pub format: Option<String>,
    pub rows: u64,
    /// Rows that a job can train on.
    pub usable_rows: u64,
    pub tokens: u64,
    pub trained_tokens: u64,
    /// Rows equal to an earlier one.
    pub duplicate_rows: u64,
    /// Rows longer than `max_seq_len`: left out of training and counted, never cut.
    pub too_long_rows: u64,
    pub max_seq_len: u64,
    pub longest_row: u64,
    pub histogram: Vec<HistogramBin>,
    /// Of labelled rows, by name; empty for other formats.
    #[serde(default)]
    #[schema(required = true)]
    pub labels: Vec<LabelCount>,
    /// The first errors, at most 50.
    pub errors: Vec<LineError>,
    pub error_count: u64,
    pub examples: Vec<RenderedExample>,
}
