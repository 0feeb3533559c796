//! Lists in pages.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::service::{Problem, fields::in_range};

/// A page. `after` of the next request is this page's `last_id`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct List<T> {
    /// Always `list`.
    pub object: String,
    pub data: Vec<T>,
    pub first_id: Option<String>,
    pub last_id: Option<String>,
    pub has_more: bool,
}

impl<T> List<T> {
    pub fn new(data: Vec<T>, has_more: bool, id: impl Fn(&T) -> &str) -> Self {
        Self {
            object: "list".to_owned(),
            first_id: data.first().map(|x| id(x).to_owned()),
            last_id: data.last().map(|x| id(x).to_owned()),
            data,
            has_more,
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Paging {
    /// The id that the page begins behind.
    pub after: Option<String>,
    /// Entries of a page, 1 to 100. Default 20.
    #[param(minimum = 1, maximum = 100)]
    pub limit: Option<i64>,
}

impl Paging {
    pub fn limit(&self) -> Result<usize, Problem> {
        Ok(in_range("limit", self.limit.unwrap_or(20), 1, 100)? as usize)
    }
}
