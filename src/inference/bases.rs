//! The resident bases of this process.

use std::sync::Arc;

use indexmap::IndexMap;

use crate::{model::Base, text::Text};

/// A model and what it says about text.
#[derive(Clone)]
pub struct Resident {
    pub base: Arc<Base>,
    pub text: Arc<Text>,
}

/// By id, in the order of configuration. Cheap to clone; never changes while the process runs.
#[derive(Clone, Default)]
pub struct Bases(Arc<IndexMap<String, Resident>>);

impl Bases {
    pub fn new(residents: impl IntoIterator<Item = Resident>) -> Self {
        Self(Arc::new(residents.into_iter().map(|r| (r.base.info.id.clone(), r)).collect()))
    }

    pub fn get(&self, id: &str) -> Option<&Resident> {
        self.0.get(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Resident> {
        self.0.values()
    }
}
