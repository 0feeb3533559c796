//! Learning from demonstrations.

use serde::{Deserialize, Serialize};

use super::{Aim, ObjectiveCard};
use crate::domain::dataset::RowKind;

/// Next-token cross entropy over the assistant's tokens. It has no knobs of its own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SupervisedSpec {}

impl Aim for SupervisedSpec {
    fn rows(&self) -> RowKind {
        RowKind::Examples
    }

    fn rate(&self) -> f64 {
        1.0
    }

    fn card(&self) -> ObjectiveCard {
        ObjectiveCard {
            definition: "Next-token cross entropy over the assistant's tokens, mean over the trained tokens of a step.",
            choose_when: "You have examples of the answers that you want.",
            avoid_when: "You only know which of two answers is better.",
        }
    }
}
