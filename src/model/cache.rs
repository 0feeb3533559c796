//! Keys and values of one sequence while it is served.

/// Owned by whoever runs the sequence; belongs to one base and one adapter generation.
pub struct SequenceCache {}

impl SequenceCache {
    /// Text tokens that are in the cache (virtual tokens and prefixes not counted).
    pub fn len(&self) -> usize {
        todo!("model")
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn bytes(&self) -> usize {
        todo!("model")
    }
}
