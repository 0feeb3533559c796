//! What an adapter with a head of its own says of a text, in the place of the vocabulary's scores.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::dataset::RowKind;

/// Which of a word's tokens its tag is read at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WordToken {
    /// As Hugging Face's recipes for encoders have it.
    First,
    /// A decoder has read the whole word only here.
    #[default]
    Last,
}

/// A linear layer over hidden rows: `score.weight` in files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskHead {
    /// One number for a text, at its last token (reward models).
    Score,
    /// Which of these a text is, at its last token.
    Sequence { labels: Vec<String> },
    /// Which of these each word is.
    Token { labels: Vec<String>, word_token: WordToken },
}

impl TaskHead {
    /// Rows of its matrix.
    pub fn width(&self) -> usize {
        self.labels().len().max(1)
    }

    /// By their numbers in the head; none where it gives a score.
    pub fn labels(&self) -> &[String] {
        match self {
            TaskHead::Score => &[],
            TaskHead::Sequence { labels } | TaskHead::Token { labels, .. } => labels,
        }
    }

    /// Hugging Face's heads of tokens have a bias, those of texts have none.
    pub fn has_bias(&self) -> bool {
        matches!(self, TaskHead::Token { .. })
    }

    /// The texts that it reads.
    pub fn reads(&self) -> RowKind {
        match self {
            TaskHead::Score => RowKind::Examples,
            TaskHead::Sequence { .. } => RowKind::Labelled,
            TaskHead::Token { .. } => RowKind::Tagged,
        }
    }

    /// The token that speaks for a span of tokens.
    pub fn place(&self, span: &Range<usize>) -> usize {
        match self {
            TaskHead::Token { word_token: WordToken::First, .. } => span.start,
            _ => span.end.saturating_sub(1),
        }
    }

    /// `task_type` in PEFT's files.
    pub fn task_type(&self) -> &'static str {
        match self {
            TaskHead::Score | TaskHead::Sequence { .. } => "SEQ_CLS",
            TaskHead::Token { .. } => "TOKEN_CLS",
        }
    }
}
