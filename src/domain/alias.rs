//! A name of the user's own for an adapter, which moves from one to the next.

/// A row of the aliases table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AliasRecord {
    pub project: String,
    pub name: String,
    /// The adapter's own name.
    pub model: String,
    /// What the alias was pointed at: the adapter's identity.
    pub generation: String,
    /// Unix seconds.
    pub updated_at: i64,
}

/// What must be so for an alias to move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    Anything,
    /// There is no such alias.
    Absent,
    /// It points at this generation.
    Generation(String),
}
