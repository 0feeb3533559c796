//! Graders tried before a job is paid for.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Problem, Service, fields::read};
use crate::{
    domain::{
        TaskHead,
        spec::{Asked, Grader, RewardModel},
    },
    inference::read_adapter,
    jobs::judge::{Graded, Judges, Means, SeatError},
    methods,
    objectives::grade::{self, GradeError, Scene},
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Validate {
    grader: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    grader: Value,
    item: Option<Value>,
    model_sample: String,
}

/// What a grader said of one text.
pub struct Trial {
    pub grader: Grader,
    /// An error is the grader's or the row's.
    pub graded: Result<Graded, GradeError>,
}

impl Service {
    pub(super) fn means(&self) -> Means {
        let Self { db, bases, engine, web, .. } = self.clone();
        Means { db, bases, engine, web }
    }

    /// The grader as it was understood.
    pub async fn validate_grader(&self, project: &str, body: Map<String, Value>) -> Result<Grader, Problem> {
        let body: Validate = read(body)?;
        self.grader(project, body.grader, "grader").await
    }

    /// Grades one text.
    pub async fn run_grader(&self, project: &str, body: Map<String, Value>) -> Result<Trial, Problem> {
        let body: Run = read(body)?;
        let grader = self.grader(project, body.grader, "grader").await?;
        let scene = Scene::new(&body.item.unwrap_or_default(), &body.model_sample);
        let judges = Judges::of(&self.means(), project, &grader, false).await?;
        Ok(Trial { graded: judges.grade(&grader, &scene).await, grader })
    }

    /// A grader of a request, which stands at `path`.
    pub(super) async fn grader(&self, project: &str, value: Value, path: &str) -> Result<Grader, Problem> {
        let wrong = |message: String| Problem::invalid(path, "spec_invalid_grader", message);
        let grader: Grader = serde_json::from_value(value).map_err(|error| wrong(format!("{path}: {error}")))?;
        grader.check(path)?;
        self.check_grader(project, &grader, path).await?;
        Ok(grader)
    }

    /// What can be said of a grader here: its formulas, and whether those whom it asks are there.
    pub(super) async fn check_grader(&self, project: &str, grader: &Grader, path: &str) -> Result<(), Problem> {
        let wrong = |error: GradeError| Problem::invalid(path, "spec_invalid_grader", error.to_string());
        grade::check(grader).map_err(wrong)?;
        for (place, asked) in grader.asked() {
            self.check_asked(project, asked, &below(path, &place)).await?;
        }
        Ok(())
    }

    /// Reward models of a job stand on its own base.
    pub(super) async fn check_bases(
        &self,
        project: &str,
        grader: &Grader,
        base: &str,
        path: &str,
    ) -> Result<(), Problem> {
        for (place, asked) in grader.asked() {
            let Asked::Reward(RewardModel { model, .. }) = asked else { continue };
            let theirs = self.model(project, model).await?.resident.base.info.id.clone();
            if theirs != base {
                let message = format!("{model} is a reward model on the base {theirs}, and the job trains on {base}");
                return Err(Problem::invalid(format!("{}.model", below(path, &place)), "wrong_base", message));
            }
        }
        Ok(())
    }

    async fn check_asked(&self, project: &str, asked: Asked<'_>, path: &str) -> Result<(), Problem> {
        let (address, field) = match asked {
            Asked::Endpoint(endpoint) => (&endpoint.url, "url"),
            Asked::Reward(asked) => {
                return self.check_reward_model(project, &asked.model, &format!("{path}.model")).await;
            }
            Asked::Model(asked) => match &asked.endpoint {
                Some(address) => (address, "endpoint"),
                None => {
                    let found = self.model(project, &asked.model).await;
                    return found.map(|_| ()).map_err(|problem| problem.at(&format!("{path}.model")));
                }
            },
        };
        self.check_address(address, &format!("{path}.{field}"))
    }

    async fn check_reward_model(&self, project: &str, name: &str, param: &str) -> Result<(), Problem> {
        let found = self.model(project, name).await.map_err(|problem| problem.at(param))?;
        let head = match &found.adapter {
            Some(record) => {
                let (_, files) = read_adapter(&self.store, &record.generation).await?;
                methods::score::head(&files).map_err(|error| Problem::from(error).at(param))?
            }
            None => None,
        };
        if head == Some(TaskHead::Score) {
            return Ok(());
        }
        let message = format!("{name} gives no scores: {param} takes what a reward_model job made");
        Err(Problem::invalid(param, "wrong_task", message))
    }

    /// Whether an address may be asked; `param` is where it stands.
    pub(super) fn check_address(&self, address: &str, param: &str) -> Result<(), Problem> {
        let refused = |why| Problem::invalid(param, "address_refused", format!("{param}: {why}"));
        self.web.check(address).map_err(refused)
    }
}

/// Where an inner grader stands, by the keys that lead to it.
fn below(path: &str, place: &str) -> String {
    let inside = place.split('.').filter(|key| !key.is_empty());
    inside.fold(path.to_owned(), |path, key| format!("{path}.graders.{key}"))
}

impl From<SeatError> for Problem {
    fn from(error: SeatError) -> Self {
        match error {
            SeatError::Unknown(name) => Problem::model_not_found(&name),
            SeatError::Db(error) => error.into(),
        }
    }
}
