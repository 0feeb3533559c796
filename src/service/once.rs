//! Requests with an `Idempotency-Key`: the thing is made once, and the same request gets the same answer for a day.

use std::future::Future;

use serde::de::DeserializeOwned;

use super::{Fault, Problem, Service};
use crate::{db::Once, inference::sha256};

/// The request as it is remembered, if it came with a key.
pub(super) fn remembered(key: Option<String>, route: &str, content: &str) -> Option<Once> {
    key.map(|key| Once { key, request: sha256(format!("{route}\n{content}").as_bytes()) })
}

impl Service {
    /// The answer that this key has, or what `work` makes and stores with it.
    pub(super) async fn once<T: DeserializeOwned>(
        &self,
        project: &str,
        once: Option<&Once>,
        work: impl Future<Output = Result<T, Problem>>,
    ) -> Result<T, Problem> {
        let Some(once) = once else { return work.await };
        if let Some(answer) = self.answered(project, once).await? {
            return Ok(answer);
        }
        match work.await {
            // The same request at the same time was faster: its answer is there now.
            Err(problem) if problem.code.as_deref() == Some(Problem::KEY_IN_USE) => {
                self.answered(project, once).await?.ok_or(problem)
            }
            other => other,
        }
    }

    async fn answered<T: DeserializeOwned>(&self, project: &str, once: &Once) -> Result<Option<T>, Problem> {
        match self.db.answer(project, &once.key).await? {
            None => Ok(None),
            Some((request, answer)) if request == once.request => {
                Ok(Some(serde_json::from_str(&answer).map_err(Problem::internal)?))
            }
            Some(_) => {
                let message = "this Idempotency-Key was used for another request in the last 24 hours";
                let problem = Problem::new(Fault::Unprocessable, "idempotency_key_reused", message);
                Err(problem.at("Idempotency-Key"))
            }
        }
    }
}
