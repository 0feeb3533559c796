//! Preferences that a judge finds: a request checked before its task is queued.

use std::io::Cursor;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Fault, Problem, Service,
    fields::{check_metadata, in_range, read},
    files::first_error,
    once::remembered,
};
use crate::{
    data::{self, Format},
    db::DbError,
    domain::{
        AnswerSampling, Caller, FileReport, JobStatus, LabelSpec, Labelling, PairJudge,
        dataset::RowKind,
        id,
        spec::{Asked, Grader},
    },
    jobs::now,
    storage::Key,
};

/// Criteria of one task, and characters of each.
const MAX_CRITERIA: usize = 32;
const MAX_CRITERION: usize = 2000;
/// Tokens of an answer.
const MAX_TOKENS: u64 = 65_536;

/// The body of `POST /v1/preferences`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    file: String,
    judge: Value,
    model: Option<String>,
    criteria: Option<Value>,
    sampling: Option<Map<String, Value>>,
    min_margin: Option<f64>,
    max_dropped: Option<f64>,
    metadata: Option<Value>,
}

impl Service {
    /// Checks a request and queues its task.
    pub async fn create_preferences(
        &self,
        caller: &Caller,
        idempotency_key: Option<String>,
        body: Map<String, Value>,
    ) -> Result<Labelling, Problem> {
        let content = serde_json::to_string(&body).map_err(Problem::internal)?;
        let once = remembered(idempotency_key, "preferences", &content);
        let work = async {
            let task = self.planned_labelling(&caller.project, read(body)?).await?;
            self.db.insert_labelling(&caller.key, &task, once.as_ref()).await?;
            self.wake.notify_one();
            Ok(task)
        };
        self.once(&caller.project, once.as_ref(), work).await
    }

    async fn planned_labelling(&self, project: &str, body: Body) -> Result<Labelling, Problem> {
        if let Some(metadata) = &body.metadata {
            check_metadata(metadata)?;
        }
        let judge = self.pair_judge(project, body.judge).await?;
        let spec = LabelSpec {
            criteria: criteria(body.criteria, &judge)?,
            sampling: sampling(body.sampling.unwrap_or_default())?,
            // Where nobody prefers anything there is nothing to learn.
            min_margin: in_range("min_margin", body.min_margin.unwrap_or(0.0), 0.0, 0.49)?,
            max_dropped: in_range("max_dropped", body.max_dropped.unwrap_or(0.5), 0.0, 1.0)?,
            model: body.model,
            file: body.file,
            judge,
        };
        let (total, kind) = self.prompts_or_pairs(project, &spec.file).await?;
        let base = match (&spec.model, kind) {
            (None, RowKind::Prompts) => {
                let message = format!("{} has prompts: name the model that answers them", spec.file);
                return Err(Problem::invalid("model", "missing_required_parameter", message));
            }
            (Some(_), RowKind::Pairs) => {
                let message = format!("{} has pairs: they are judged as they are, so leave model out", spec.file);
                return Err(Problem::invalid("model", "unsupported_parameter", message));
            }
            (Some(name), _) => Some(self.model(project, name).await?),
            (None, _) => match models_of(&spec.judge).first() {
                Some(name) => Some(self.model(project, name).await?),
                None => None,
            },
        };
        Ok(Labelling {
            id: id::new("pref-"),
            project: project.to_owned(),
            created_at: now(),
            started_at: None,
            finished_at: None,
            status: JobStatus::Queued,
            base: base.map(|model| model.resident.base.info.id.clone()).unwrap_or_default(),
            spec,
            total: total as i64,
            done: 0,
            report: None,
            result_file: None,
            error: None,
            metadata: body.metadata,
            fence: 0,
            barren_attempts: 0,
        })
    }

    async fn pair_judge(&self, project: &str, mut value: Value) -> Result<PairJudge, Problem> {
        // Read by itself, so that its faults have its own fields.
        if value["type"] == "grader"
            && let Some(inner) = value.get_mut("grader")
        {
            let grader: Grader = self.grader(project, inner.take(), "judge.grader").await?;
            *inner = serde_json::to_value(grader).map_err(Problem::internal)?;
        }
        let wrong = |error| Problem::invalid("judge", "invalid_judge", format!("judge: {error}"));
        let judge: PairJudge = serde_json::from_value(value).map_err(wrong)?;
        match &judge {
            PairJudge::Model { model, .. } if model.is_empty() => {
                Err(Problem::invalid("judge.model", "invalid_judge", "judge.model is empty"))
            }
            PairJudge::Model { endpoint: Some(address), .. } => {
                self.check_address(address, "judge.endpoint")?;
                Ok(judge)
            }
            PairJudge::Model { model, endpoint: None } => {
                self.model(project, model).await.map_err(|problem| problem.at("judge.model"))?;
                Ok(judge)
            }
            PairJudge::Grader { .. } => Ok(judge),
        }
    }

    /// How many rows a file has, and of which of the two kinds.
    async fn prompts_or_pairs(&self, project: &str, file: &str) -> Result<(u64, RowKind), Problem> {
        let record = self.file(project, file).await.map_err(|problem| problem.at("file"))?;
        if record.purpose != "fine-tune" {
            let message = format!("{file} was uploaded for {}, not for fine-tune", record.purpose);
            return Err(Problem::invalid("file", "invalid_purpose", message));
        }
        let bytes = self.store.get(&Key::File { id: file.to_owned() }).await?;
        let read = tokio::task::spawn_blocking(move || data::check_structure(Cursor::new(bytes))).await;
        let report: FileReport = read
            .map_err(Problem::internal)?
            .map_err(|error| Problem::invalid("file", "dataset_invalid", error.to_string()))?;
        if let Some(error) = report.errors.first() {
            let message = first_error(&report).unwrap_or_default().replace("{id}", file);
            return Err(Problem::invalid("file", &format!("dataset_{}", error.code), message));
        }
        let format = report.format.as_deref().unwrap_or_default();
        match Format::parse(format).map(Format::kind) {
            Some(kind @ (RowKind::Prompts | RowKind::Pairs)) => Ok((report.rows, kind)),
            _ => {
                let message = format!(
                    "{file} has rows of format {format}; preferences are found for {}, or between {}",
                    RowKind::Prompts.wanted(),
                    RowKind::Pairs.wanted()
                );
                Err(Problem::invalid("file", "dataset_wrong_format", message))
            }
        }
    }

    pub async fn preferences(&self, project: &str, id: &str) -> Result<Labelling, Problem> {
        self.db.labelling(project, id).await.map_err(|error| of_task(error, id))
    }

    pub async fn cancel_preferences(&self, caller: &Caller, id: &str) -> Result<Labelling, Problem> {
        self.db.cancel_labelling(caller, id).await.map_err(|error| of_task(error, id))
    }
}

fn of_task(error: DbError, id: &str) -> Problem {
    match error {
        DbError::NotFound => Problem::not_found("preferences task", id),
        DbError::Conflict(message) => Problem::new(Fault::Invalid, "invalid_state", message),
        error => error.into(),
    }
}

/// The models of this server that a judge asks.
fn models_of(judge: &PairJudge) -> Vec<String> {
    match judge {
        PairJudge::Model { model, endpoint: None } => vec![model.clone()],
        PairJudge::Model { .. } => Vec::new(),
        PairJudge::Grader { grader } => {
            let here = |(_, asked): (String, Asked)| match asked {
                Asked::Model(asked) if asked.endpoint.is_none() => Some(asked.model.clone()),
                _ => None,
            };
            grader.asked().into_iter().filter_map(here).collect()
        }
    }
}

fn criteria(value: Option<Value>, judge: &PairJudge) -> Result<Vec<String>, Problem> {
    let wrong = |message: String| Problem::invalid("criteria", "invalid_criteria", message);
    let all = match value {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(many)) => {
            let text = |one: &Value| one.as_str().map(str::to_owned);
            let all: Option<Vec<String>> = many.iter().map(text).collect();
            all.ok_or_else(|| wrong("criteria takes a text or a list of texts".to_owned()))?
        }
        Some(_) => return Err(wrong("criteria takes a text or a list of texts".to_owned())),
    };
    if matches!(judge, PairJudge::Grader { .. }) {
        return Err(wrong("criteria are for judges that are models: a grader has its own".to_owned()));
    }
    let is_sound = |one: &String| !one.trim().is_empty() && one.chars().count() <= MAX_CRITERION;
    if !(1..=MAX_CRITERIA).contains(&all.len()) || !all.iter().all(is_sound) {
        return Err(wrong(format!("criteria takes 1 to {MAX_CRITERIA} texts of 1 to {MAX_CRITERION} characters")));
    }
    Ok(all)
}

fn sampling(fields: Map<String, Value>) -> Result<AnswerSampling, Problem> {
    let within = |problem: Problem| {
        let param = format!("sampling.{}", problem.param.as_deref().unwrap_or_default());
        problem.at(&param)
    };
    let sampling: AnswerSampling = read(fields).map_err(within)?;
    in_range("sampling.temperature", sampling.temperature, 1e-3, 2.0)?;
    in_range("sampling.top_p", sampling.top_p, f64::from(f32::MIN_POSITIVE), 1.0)?;
    in_range("sampling.max_completion_tokens", sampling.max_completion_tokens, 1, MAX_TOKENS)?;
    // JSON numbers of other languages are exact to 2^53.
    in_range("sampling.seed", sampling.seed, 0, 1 << 53)?;
    Ok(sampling)
}
