//! What users read before they choose a method.

use serde::Serialize;
use utoipa::ToSchema;

/// When a method is the right one, and what it costs.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Card {
    /// The formula, with its source.
    pub definition: &'static str,
    pub choose_when: &'static str,
    pub avoid_when: &'static str,
    /// What a request pays beside the base's own work.
    pub inference_overhead: &'static str,
    /// Whether its result can be merged into the base's weights.
    pub mergeable: bool,
    /// `peft_type` of the files that it writes.
    pub file_format: &'static str,
}
