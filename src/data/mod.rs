//! Datasets: rows in the formats that users have, checked, rendered by the base's template, and masked.
//! No tensors, no network, no order: batches and epochs are the trainer's.

mod chat;
mod compared;
mod labelled;
mod lines;
mod preference;
mod record;
mod render;
mod validate;

use std::{io::BufRead, ops::Range};

use serde_json::Value;

use crate::{
    domain::{LineError, dataset::RowKind},
    text::Text,
};

pub use compared::{Compared, Side, compared};
pub use labelled::{LabelledText, TaggedWords};
pub use preference::{Answer, Judgement, Preference};
pub use record::{Chat, Completion, Format, Question, Record, Tokens};
pub use validate::{check_structure, load, question, validate};

/// The longest line, in bytes. A longer one is passed over without being held in memory.
pub const MAX_LINE_BYTES: usize = 8 << 20;
/// Rows of one dataset.
pub const MAX_ROWS: u64 = 1_000_000;
/// Messages of one conversation.
pub const MAX_MESSAGES: usize = 1024;

/// One text as token ids. `labels[i]` is `Some(ids[i])` where the token is trained on, `None` where it is only read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// From 1.
    pub line: u64,
    pub ids: Vec<u32>,
    pub labels: Vec<Option<u32>>,
}

impl Example {
    /// Trained tokens: labels from position 1 on, since position 0 is never a target.
    pub fn trained(&self) -> usize {
        self.labels.iter().skip(1).flatten().count()
    }
}

/// One row as an objective takes it.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    Example(Example),
    Pair(Pair),
    Judged(Judged),
    Prompt(Prompt),
    Labelled(Marked),
    Tagged(Marked),
    /// Not from a file: a run's own completion.
    Sampled(Sampled),
}

/// A question, rendered up to where the answer begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    pub text: Example,
    /// The whole row, for graders.
    pub item: Value,
}

/// A text of which parts have names: all of it, or each word.
#[derive(Clone, Debug, PartialEq)]
pub struct Marked {
    /// Without labels: no token of it is predicted.
    pub text: Example,
    /// In order.
    pub marks: Vec<Mark>,
}

/// What some of a text's tokens are called together.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    pub tokens: Range<usize>,
    pub label: String,
}

/// A text to be read by an adapter's head.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// The rows that it looks like: `Examples`, `Labelled` or `Tagged`.
    pub kind: RowKind,
    pub ids: Vec<u32>,
    /// What the head speaks of: the text, or each word.
    pub spans: Vec<Range<usize>>,
}

/// A completion that a run has drawn, and what it was worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub example: Example,
    pub advantage: f64,
    /// What it was drawn with; log-probabilities are at the same.
    pub temperature: f64,
    /// Of each trained token, under the policy that drew it; none while that is the policy.
    pub old: Option<Vec<f64>>,
    /// The same under the reference; empty without one.
    pub reference: Vec<f64>,
    /// Of each trained token; empty without a value head.
    pub worth: Vec<Worth>,
}

/// What a token is worth by a value head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worth {
    pub advantage: f64,
    /// What came of it: the value head's target.
    pub returned: f64,
    /// What the value head expected before it.
    pub value: f64,
}

/// Two answers to one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    pub chosen: Example,
    pub rejected: Example,
    /// By how much the chosen one is better; 0 where nobody said.
    pub margin: f64,
    /// That the chosen one is better, ½ to 1; 1 where nobody doubts it.
    pub probability: f64,
}

/// An answer with a thumb up or down.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    pub example: Example,
    pub is_desirable: bool,
}

impl Row {
    pub fn kind(&self) -> RowKind {
        match self {
            Row::Example(_) => RowKind::Examples,
            Row::Pair(_) => RowKind::Pairs,
            Row::Judged(_) => RowKind::Judged,
            Row::Prompt(_) | Row::Sampled(_) => RowKind::Prompts,
            Row::Labelled(_) => RowKind::Labelled,
            Row::Tagged(_) => RowKind::Tagged,
        }
    }

    /// The texts of the row; a pair's chosen one first.
    pub fn examples(&self) -> impl Iterator<Item = &Example> {
        let (first, second) = match self {
            Row::Example(example) => (example, None),
            Row::Pair(pair) => (&pair.chosen, Some(&pair.rejected)),
            Row::Judged(judged) => (&judged.example, None),
            Row::Prompt(prompt) => (&prompt.text, None),
            Row::Sampled(sampled) => (&sampled.example, None),
            Row::Labelled(marked) | Row::Tagged(marked) => (&marked.text, None),
        };
        std::iter::once(first).chain(second)
    }

    /// What parts of the row are called; empty for rows of other kinds.
    pub fn marks(&self) -> &[Mark] {
        match self {
            Row::Labelled(marked) | Row::Tagged(marked) => &marked.marks,
            _ => &[],
        }
    }

    /// Trained tokens of all texts, or the names of its parts.
    pub fn trained(&self) -> usize {
        self.marks().len() + self.examples().map(Example::trained).sum::<usize>()
    }

    /// Whether there is something to learn in each of its texts.
    pub fn is_trained(&self) -> bool {
        self.kind() == RowKind::Prompts || !self.marks().is_empty() || self.examples().all(|text| text.trained() > 0)
    }

    /// Tokens of all texts.
    pub fn tokens(&self) -> usize {
        self.examples().map(|example| example.ids.len()).sum()
    }

    /// Tokens of the longest text.
    pub fn longest(&self) -> usize {
        self.examples().map(|example| example.ids.len()).max().unwrap_or(0)
    }
}

impl From<Example> for Row {
    fn from(example: Example) -> Self {
        Row::Example(example)
    }
}

/// The base that a dataset is read for.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub text: &'a Text,
    /// The base's id, as requests name it.
    pub base_id: &'a str,
    /// Rows of more tokens are counted and left out of training, never cut.
    pub max_seq_len: usize,
    /// Ids that the base knows: `BaseInfo::vocab`.
    pub vocab: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("the dataset cannot be read: {0}")]
    Read(#[from] std::io::Error),
    #[error("line {}: {}", .0.line, .0.message)]
    Line(LineError),
    #[error("the dataset has no rows")]
    Empty,
}

/// What is wrong with a row; the line number is added by whoever reads lines.
#[derive(Debug, PartialEq)]
struct Fault {
    code: &'static str,
    message: String,
}

impl Fault {
    fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    fn at(self, line: u64) -> LineError {
        LineError { line, code: self.code.to_owned(), message: self.message }
    }
}

/// A name from outside, short enough for a message.
fn shown(name: &str) -> String {
    let mut text: String = name.chars().take(64).flat_map(char::escape_default).collect();
    if name.chars().nth(64).is_some() {
        text.push('…');
    }
    text
}

/// Rows in the order of the file, each number from 1, blank lines passed over.
fn lines(reader: impl BufRead) -> lines::Lines<impl BufRead> {
    lines::Lines::new(reader, MAX_LINE_BYTES)
}
