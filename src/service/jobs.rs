//! Jobs: a request checked against its base and its data before anything is queued.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Fault, Problem, Service,
    catalogue::Model,
    feedback::{RowFormat, Selection},
    fields::{Unsupported, check_metadata, in_range, read, refuse_unsupported},
    files::first_error,
    once::remembered,
};
use crate::{
    data::Format,
    db::{DbError, Wish},
    domain::{
        Caller, FileReport, Job, JobStatus, MethodSpec, ObjectiveSpec, TaskHead, TrainSpec, Training, id,
        spec::{Hyperparameters, TrainingRequest},
    },
    inference::read_adapter,
    jobs::now,
    methods, trainer,
};

/// The body of `POST /v1/fine_tuning/jobs`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    model: String,
    training_file: Option<String>,
    /// In the place of a file: what people said of answers in a period.
    feedback: Option<Value>,
    validation_file: Option<String>,
    suffix: Option<String>,
    seed: Option<u64>,
    method: Option<Value>,
    hyperparameters: Option<Value>,
    metadata: Option<Value>,
    adapter: Option<Value>,
    training: Option<Value>,
    priority: Option<i64>,
    dry_run: Option<bool>,
}

/// What a job asks of its files.
struct Wanted<'a> {
    objective: &'a ObjectiveSpec,
    max_seq_len: u64,
}

/// Integrations with other services are not served; an empty list asks for none.
const UNSUPPORTED: [Unsupported; 1] =
    [Unsupported { name: "integrations", neutral: |value| value.as_array().is_some_and(Vec::is_empty) }];

/// A request that was checked: what it would queue, and on what.
pub(super) struct Planned {
    pub job: Job,
    pub model: Model,
}

fn checked(mut body: Map<String, Value>) -> Result<Body, Problem> {
    refuse_unsupported(&mut body, &UNSUPPORTED)?;
    read(body)
}

impl Service {
    /// Checks a request and, unless it is a dry run, queues its job.
    pub async fn create_job(
        &self,
        caller: &Caller,
        idempotency_key: Option<String>,
        body: Map<String, Value>,
    ) -> Result<Job, Problem> {
        let content = serde_json::to_string(&body).map_err(Problem::internal)?;
        let once = remembered(idempotency_key, "jobs", &content);
        let project = &caller.project;
        let body = checked(body)?;
        let work = async {
            let job = self.plan(caller, &body).await?.job;
            if !body.dry_run.unwrap_or(false) {
                self.db.insert_job(&caller.key, &job, once.as_ref()).await?;
                self.wake.notify_one();
            }
            Ok(job)
        };
        self.once(project, once.as_ref(), work).await
    }

    /// What a request would queue.
    pub(super) async fn planned(&self, caller: &Caller, body: Map<String, Value>) -> Result<Planned, Problem> {
        self.plan(caller, &checked(body)?).await
    }

    async fn plan(&self, caller: &Caller, body: &Body) -> Result<Planned, Problem> {
        let project = caller.project.as_str();
        if let Some(metadata) = &body.metadata {
            check_metadata(metadata)?;
        }
        let suffix = body.suffix.as_deref().map(check_suffix).transpose()?;
        let model = self.model(project, &body.model).await?;
        let base = &model.resident.base.info;
        let method = body.method.clone().unwrap_or_else(|| json!({"type": "supervised"}));
        let mut objective = ObjectiveSpec::from_json(&method)?;
        if let Some(Some(grader)) = objective.grader() {
            let param = objective.grader_path();
            self.check_grader(project, grader, &param).await?;
            self.check_bases(project, grader, &base.id, &param).await?;
            if body.validation_file.is_some() {
                let message =
                    format!("{} is judged by its rewards: it takes no validation file", objective.type_name());
                return Err(Problem::invalid("validation_file", "unsupported_parameter", message));
            }
        }
        let hyper = match (&body.hyperparameters, Hyperparameters::from_method(&method)?) {
            (Some(old), new) if new.is_empty() => {
                Hyperparameters { objective: new.objective, ..Hyperparameters::from_json(old, "hyperparameters")? }
            }
            (Some(_), _) => {
                let message = "hyperparameters stand in method already: leave the older field out";
                return Err(Problem::invalid("hyperparameters", "given_twice", message));
            }
            (None, new) => new,
        };
        let is_auto = body.adapter.as_ref().map_or(Ok(false), MethodSpec::is_auto)? && model.adapter.is_none();
        let asked = body.adapter.as_ref().filter(|_| !is_auto);
        let mut adapter = self.adapter_spec(&model, asked, &mut objective).await?;
        adapter.check(base)?;
        if let (MethodSpec::Xlora(spec), None) = (&mut adapter, &model.adapter) {
            self.find_experts(project, &model, spec).await?;
            adapter.check(base)?;
        }
        adapter.check_objective(base, &objective)?;
        let request = TrainingRequest::from_json(body.training.as_ref().unwrap_or(&Value::Null), &hyper)?;
        // Ranges first, so that a wrong number does not wait for the data.
        let checked = Training::resolve(&request, &adapter, base, 0)?;
        let training_file = self.training_file(caller, body, &objective).await?;
        let wanted = Wanted { objective: &objective, max_seq_len: checked.max_seq_len };
        let report = self.usable(project, &model, &training_file, "training_file", &wanted).await?;
        let labels = labels_of(&objective, &report)?;
        if let Some(file) = &body.validation_file {
            let valid = self.usable(project, &model, file, "validation_file", &wanted).await?;
            known(&labels, &valid, "validation_file")?;
        }
        if objective.labels().is_none() {
            objective.with_labels(labels);
        }
        let training = Training::resolve(&request, &adapter, base, report.usable_rows)?;
        if model.adapter.is_none() {
            let held_out = body.validation_file.is_none();
            adapter.fit(base, trainer::total_steps(&training, report.usable_rows as usize, held_out))?;
        }
        let priority = in_range("priority", body.priority.unwrap_or(0), -100, 100)?;
        let tag = id::random(8).to_lowercase();
        let spec = TrainSpec {
            base: base.id.clone(),
            continue_from: model.adapter.as_ref().map(|adapter| adapter.generation.clone()),
            suffix: suffix.clone(),
            adapter,
            objective,
            training,
            // JSON numbers of other languages are exact to 2^53.
            seed: in_range("seed", body.seed.unwrap_or(42), 0, 1 << 53)?,
        };
        let mut job = Job {
            id: id::new("ftjob-"),
            project: project.to_owned(),
            created_at: now(),
            started_at: None,
            finished_at: None,
            status: JobStatus::Queued,
            requested: None,
            model: model.name.clone(),
            training_file,
            validation_file: body.validation_file.clone(),
            output_model: format!("ft:{}:{project}:{}:{tag}", base.id, suffix.unwrap_or_default()),
            spec,
            priority,
            fine_tuned_model: None,
            trained_tokens: None,
            result_files: Vec::new(),
            error: None,
            metadata: body.metadata.clone(),
            fence: 0,
            barren_attempts: 0,
            estimated_finish: None,
        };
        if is_auto {
            let mut best = self.best(&model, &job).await?;
            job.spec.training = Training::resolve(&request, &best, base, report.usable_rows)?;
            let held_out = body.validation_file.is_none();
            best.fit(base, trainer::total_steps(&job.spec.training, report.usable_rows as usize, held_out))?;
            job.spec.adapter = best;
        }
        Ok(Planned { job, model })
    }

    /// The file that is named, or one made of feedback, in the format that the objective trains on.
    async fn training_file(&self, caller: &Caller, body: &Body, objective: &ObjectiveSpec) -> Result<String, Problem> {
        match (&body.training_file, &body.feedback) {
            (Some(file), None) => Ok(file.clone()),
            (None, Some(Value::Object(selection))) => {
                let within = |problem: Problem| {
                    let param = problem.param.as_deref().unwrap_or_default();
                    Problem { param: Some(format!("feedback.{param}")), ..problem }
                };
                let selection: Selection = read(selection.clone()).map_err(within)?;
                let format = RowFormat::of(objective)?;
                let made = self.export_feedback(caller, &selection, format).await.map_err(within)?;
                Ok(made.file.id)
            }
            (None, Some(_)) => Err(Problem::invalid("feedback", "invalid_type", "feedback is not an object")),
            (Some(_), Some(_)) => {
                let message = "training_file and feedback are two sources: leave one out";
                Err(Problem::invalid("feedback", "given_twice", message))
            }
            (None, None) => {
                Err(Problem::invalid("training_file", "missing_required_parameter", "missing field training_file"))
            }
        }
    }

    /// The request's `adapter`, or the one of the tuned model that is continued.
    async fn adapter_spec(
        &self,
        model: &Model,
        asked: Option<&Value>,
        objective: &mut ObjectiveSpec,
    ) -> Result<MethodSpec, Problem> {
        match (&model.adapter, asked) {
            (Some(_), Some(_)) => {
                let message = format!("{} is continued with its own adapter settings: leave adapter out", model.name);
                Err(Problem::invalid("adapter", "given_twice", message))
            }
            (Some(record), None) => {
                let (_, files) = read_adapter(&self.store, &record.generation).await?;
                let head = methods::score::head(&files).map_err(|error| Problem::from(error).at("model"))?;
                if let Some(head) = head {
                    goes_on(&model.name, &head, objective)?;
                }
                methods::continued(&files).map_err(|error| Problem::from(error).at("model"))
            }
            (None, Some(asked)) => Ok(MethodSpec::from_json(asked)?),
            (None, None) => Ok(MethodSpec::from_json(&json!({"type": "lora"}))?),
        }
    }

    /// A training file whose every row can be used on this base, but for those that are too long.
    async fn usable(
        &self,
        project: &str,
        model: &Model,
        file: &str,
        param: &str,
        wanted: &Wanted<'_>,
    ) -> Result<FileReport, Problem> {
        let max_seq_len = wanted.max_seq_len;
        let record = self.file(project, file).await.map_err(|problem| problem.at(param))?;
        if record.purpose != "fine-tune" {
            let message = format!("{file} was uploaded for {}, not for fine-tune", record.purpose);
            return Err(Problem::invalid(param, "invalid_purpose", message));
        }
        let report = self.report(&record, &model.resident, max_seq_len).await.map_err(|problem| problem.at(param))?;
        if let Some(error) = report.errors.first() {
            let message = first_error(&report).unwrap_or_default().replace("{id}", file);
            return Err(Problem::invalid(param, &format!("dataset_{}", error.code), message));
        }
        let (format, rows) = (report.format.as_deref().unwrap_or_default(), wanted.objective.rows());
        if Format::parse(format).is_none_or(|format| format.kind() != rows) {
            let objective = wanted.objective.type_name();
            let message = format!("{file} has rows of format {format}; {objective} reads {}", rows.wanted());
            return Err(Problem::invalid(param, "dataset_wrong_format", message));
        }
        if report.usable_rows == 0 {
            let message = match report.too_long_rows {
                0 => format!("{file} has no rows"),
                n => format!("all {n} rows of {file} are longer than max_seq_len, {max_seq_len} tokens"),
            };
            return Err(Problem::invalid(param, "dataset_empty", message));
        }
        Ok(report)
    }

    pub async fn job(&self, project: &str, id: &str) -> Result<Job, Problem> {
        self.db.job(project, id).await.map_err(|error| of_job(error, id))
    }

    pub async fn steer(&self, caller: &Caller, id: &str, wish: Wish) -> Result<Job, Problem> {
        let job = self.db.steer(caller, id, wish).await.map_err(|error| of_job(error, id))?;
        self.wake.notify_one();
        Ok(job)
    }
}

fn of_job(error: DbError, id: &str) -> Problem {
    match error {
        DbError::NotFound => Problem::not_found("fine-tuning job", id),
        DbError::Conflict(message) => Problem::new(Fault::Invalid, "invalid_job_state", message),
        error => error.into(),
    }
}

/// Whether an objective trains on a head that is there; it takes the head's labels.
fn goes_on(model: &str, head: &TaskHead, objective: &mut ObjectiveSpec) -> Result<(), Problem> {
    if objective.labels().is_none() {
        objective.with_labels(head.labels().to_vec());
    }
    if objective.head().as_ref() == Some(head) {
        return Ok(());
    }
    let (code, reason) = match (head, objective.head()) {
        (TaskHead::Score, _) => ("adapter_scores", "gives scores: only reward_model can train it on".to_owned()),
        (TaskHead::Sequence { .. }, Some(TaskHead::Sequence { .. }))
        | (TaskHead::Token { .. }, Some(TaskHead::Token { .. })) => {
            ("adapter_labels", format!("has other labels, or reads them elsewhere: {}", head.labels().join(", ")))
        }
        (TaskHead::Sequence { .. }, _) => {
            ("adapter_labels", "labels texts: only sequence_classification can train it on".to_owned())
        }
        (TaskHead::Token { .. }, _) => {
            ("adapter_labels", "tags words: only token_classification can train it on".to_owned())
        }
    };
    Err(Problem::invalid("model", code, format!("{model} {reason}")))
}

/// The labels of a run: those that the request names, or those of the training file; none for other objectives.
fn labels_of(objective: &ObjectiveSpec, report: &FileReport) -> Result<Vec<String>, Problem> {
    if let Some(labels) = objective.labels() {
        known(labels, report, "training_file")?;
        return Ok(labels.to_vec());
    }
    if let ([one], Some(_)) = (report.labels.as_slice(), objective.head()) {
        let message = format!("all rows are {}: a classifier needs two labels at least", one.label);
        return Err(Problem::invalid("training_file", "dataset_one_label", message));
    }
    let mut labels: Vec<String> = report.labels.iter().map(|found| found.label.clone()).collect();
    // By name, or by number where all are numbers.
    if labels.iter().all(|label| label.parse::<i64>().is_ok()) {
        labels.sort_by_key(|label| label.parse::<i64>().unwrap_or_default());
    }
    Ok(labels)
}

/// No label of a file is new.
fn known(labels: &[String], report: &FileReport, param: &str) -> Result<(), Problem> {
    let strangers = report.labels.iter().filter(|found| !labels.contains(&found.label));
    let Some(first) = strangers.min_by_key(|found| found.first_line) else { return Ok(()) };
    let (line, label, known) = (first.first_line, &first.label, labels.join(", "));
    let message = format!("line {line}: the label {label} is not one of {known}");
    Err(Problem::invalid(param, "dataset_unknown_label", message))
}

/// Goes into the model's name: letters, digits, `-`, `_`, `.`, to 64.
pub(super) fn check_suffix(suffix: &str) -> Result<String, Problem> {
    let fits = (1..=64).contains(&suffix.len());
    if fits && suffix.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        return Ok(suffix.to_owned());
    }
    let message = "suffix takes 1 to 64 letters, digits, dots, dashes and underscores";
    Err(Problem::invalid("suffix", "invalid_suffix", message))
}
