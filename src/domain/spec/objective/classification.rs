//! Learning what texts and words are called.

use serde::{Deserialize, Serialize};

use super::{Aim, ObjectiveCard, join};
use crate::domain::{SpecError, WordToken, dataset::RowKind};

/// The most labels of one head.
pub const MAX_LABELS: usize = 1000;
/// The longest label, in characters.
pub const MAX_LABEL: usize = 100;

/// What a text is called.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SequenceClassificationSpec {
    /// In the order of the head's rows; none until the training file says them.
    pub labels: Option<Vec<String>>,
}

/// What each word of a text is called.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenClassificationSpec {
    /// In the order of the head's rows; none until the training file says them.
    pub labels: Option<Vec<String>>,
    pub word_token: WordToken,
}

impl Aim for SequenceClassificationSpec {
    fn rows(&self) -> RowKind {
        RowKind::Labelled
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        check(self.labels.as_deref(), path)
    }

    fn rate(&self) -> f64 {
        1.0
    }

    fn labels(&self) -> Option<&[String]> {
        self.labels.as_deref()
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "Cross entropy of a linear layer over the hidden row of a text's last token, mean over the texts \
                of a step (Hugging Face's …ForSequenceClassification).",
            choose_when: "A text is one of a few things: a topic, a mood, a language, spam or not.",
            avoid_when: "The answer is a text, or there are more than a thousand of them.",
        }
    }
}

impl Aim for TokenClassificationSpec {
    fn rows(&self) -> RowKind {
        RowKind::Tagged
    }

    fn check(&self, path: &str) -> Result<(), SpecError> {
        check(self.labels.as_deref(), path)
    }

    fn rate(&self) -> f64 {
        1.0
    }

    fn labels(&self) -> Option<&[String]> {
        self.labels.as_deref()
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "Cross entropy of a linear layer over the hidden row of one token of each word, mean over the \
                words of a step (Hugging Face's …ForTokenClassification); word_token says which.",
            choose_when: "Names, places or terms are to be found in texts: tags such as B-PER, I-PER and O.",
            avoid_when: "A word's tag hangs on what comes after it: a decoder reads from left to right.",
        }
    }
}

/// Two or more, each once.
fn check(labels: Option<&[String]>, path: &str) -> Result<(), SpecError> {
    let Some(labels) = labels else { return Ok(()) };
    let param = join(path, "labels");
    let wrong = |code, message: String| Err(SpecError::new(param.clone(), code, format!("{param} {message}")));
    if !(2..=MAX_LABELS).contains(&labels.len()) {
        return wrong("spec_out_of_range", format!("has {} labels; it takes 2 to {MAX_LABELS}", labels.len()));
    }
    if let Some(label) = labels.iter().find(|label| !fits(label)) {
        return wrong("spec_out_of_range", format!("has {label:?}: a label has 1 to {MAX_LABEL} characters"));
    }
    match labels.iter().enumerate().find(|(i, label)| labels[..*i].contains(label)) {
        Some((_, label)) => wrong("spec_given_twice", format!("names {label} twice")),
        None => Ok(()),
    }
}

/// Whether a label's length is within the limits.
pub fn fits(label: &str) -> bool {
    (1..=MAX_LABEL).contains(&label.chars().count())
}
