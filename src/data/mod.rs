//! Datasets: rows in the formats that users have, checked, rendered by the base's template, masked and batched.
//! No tensors, no network.

/// One row as token ids. `labels[i]` is `Some(ids[i])` where the token is trained on, `None` where it is only read.
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
