//! One attempt at a job, from its dataset to its published adapter.

use std::{io::Cursor, sync::Arc};

use anyhow::Context as _;

use super::{
    Context,
    judge::{Judges, SeatError},
    memory, now,
    observe::{JobObserver, Signals},
    publish::publish_adapter,
    rollout::{EngineRollout, GraderReward},
};
use crate::{
    data::{self, DataError, Row},
    db::{Claim, DbError, NewEvent, Publication},
    domain::{AdapterRecord, EventKind, Failure, FileRecord, Job, Metrics, Snapshot, id, spec::Grader},
    inference::{AdapterRef, ArtifactError, Resident, read_adapter, sha256},
    methods::{AdapterFiles, MethodError},
    objectives::grade::GradeError,
    storage::{Key, StorageError},
    trainer::{self, Outcome, Run, TrainError, World},
};

/// The training thread's stack: candle's backward recurses once a node. Only what is touched takes memory.
const STACK: usize = 512 << 20;

/// Why an attempt ended without a result.
pub(super) enum Stop {
    /// The job is at fault, or we are: it fails.
    Failed(Failure),
    /// Another attempt owns the job.
    Fenced,
    /// Nobody's fault: try again later.
    Again(anyhow::Error),
}

fn failed(code: &str, message: impl Into<String>, param: Option<&str>) -> Stop {
    Stop::Failed(Failure { code: code.to_owned(), message: message.into(), param: param.map(str::to_owned) })
}

impl From<DbError> for Stop {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Fenced => Stop::Fenced,
            // Its name was given away: no later attempt can have it.
            DbError::Conflict(message) => failed("spec_name_taken", message, Some("suffix")),
            error => Stop::Again(error.into()),
        }
    }
}

impl From<ArtifactError> for Stop {
    fn from(error: ArtifactError) -> Self {
        Stop::Again(error.into())
    }
}

/// Runs an attempt and writes how it ended.
pub(super) async fn attempt(context: &Context, claim: Claim, signals: Arc<Signals>) -> anyhow::Result<()> {
    let job = claim.job;
    let ended = match train(context, &job, signals).await {
        Ok((Outcome::Finished { adapter, metrics }, resident)) => {
            finish(context, &job, &resident, adapter, &metrics).await
        }
        Ok((Outcome::Paused, _)) => context.db.paused(&job).await.map_err(Stop::from),
        Ok((Outcome::Cancelled, _)) => context.db.cancelled(&job).await.map_err(Stop::from),
        Ok((Outcome::Drained, _)) => context.db.released(&job).await.map_err(Stop::from),
        Err(stop) => Err(stop),
    };
    match ended {
        Ok(()) => Ok(()),
        Err(Stop::Failed(failure)) => match context.db.fail(&job, &failure).await {
            Err(DbError::Fenced) => Ok(()),
            other => Ok(other?),
        },
        Err(Stop::Fenced) => {
            tracing::warn!(job.id = job.id, "the attempt lost its lease; its work is thrown away");
            Ok(())
        }
        Err(Stop::Again(error)) => {
            let pause = match context.db.give_back(&job).await {
                Err(DbError::Fenced) => return Ok(()),
                other => other?,
            };
            tracing::warn!(job.id = job.id, pause_s = pause, "a passing fault ended the attempt: {error:#}");
            Ok(())
        }
    }
}

async fn train(context: &Context, job: &Job, signals: Arc<Signals>) -> Result<(Outcome, Resident), Stop> {
    let Some(resident) = context.bases.get(&job.spec.base).cloned() else {
        let message = format!("the base {} is not resident on this worker", job.spec.base);
        return Err(failed("spec_unknown_model", message, Some("model")));
    };
    let train = dataset(context, job, &resident, &job.training_file, "training_file").await?;
    let valid = match &job.validation_file {
        Some(file) => dataset(context, job, &resident, file, "validation_file").await?,
        // The trainer holds out its own share.
        None => Vec::new(),
    };
    let (mut start, mut experts) = (None, Vec::new());
    match &job.spec.continue_from {
        Some(generation) => start = Some(stored(context, generation, "model").await?),
        None => {
            for generation in job.spec.adapter.sources() {
                experts.push(stored(context, generation, "adapter.adapters").await?);
            }
        }
    }
    let resume = latest_snapshot(context, job).await?;
    let observer = JobObserver {
        context: context.clone(),
        job: job.clone(),
        resident: resident.clone(),
        signals,
        runtime: tokio::runtime::Handle::current(),
        started: None,
        shown: None,
    };
    let judges = match job.spec.objective.grader().flatten() {
        Some(grader) => Some((grader.clone(), judges(context, job, grader).await?)),
        None => None,
    };
    let work = Work {
        judges,
        job: job.clone(),
        resident: resident.clone(),
        train,
        valid,
        start,
        experts,
        resume,
        memory_limit: context.memory_limit,
        observer,
    };
    Ok((on_a_thread(work).await?, resident))
}

/// Those whom a job's grader asks.
async fn judges(context: &Context, job: &Job, grader: &Grader) -> Result<Judges, Stop> {
    Judges::of(&context.means(), &job.project, grader, true).await.map_err(|error| match error {
        SeatError::Unknown(_) => {
            failed("spec_unknown_model", error.to_string(), Some(&job.spec.objective.grader_path()))
        }
        SeatError::Db(error) => error.into(),
    })
}

/// What goes to the training thread.
struct Work {
    /// The grader, and those whom it asks.
    judges: Option<(Grader, Judges)>,
    job: Job,
    resident: Resident,
    train: Vec<Row>,
    valid: Vec<Row>,
    start: Option<AdapterFiles>,
    experts: Vec<AdapterFiles>,
    resume: Option<Snapshot>,
    memory_limit: Option<u64>,
    observer: JobObserver,
}

async fn on_a_thread(mut work: Work) -> Result<Outcome, Stop> {
    let (answer, outcome) = tokio::sync::oneshot::channel();
    let body = move || {
        let tokenize = |text: &str| {
            let ids = work.resident.text.tokenizer.encode(text, false);
            ids.map_err(|error| MethodError::Mismatch(error.to_string()))
        };
        let rollout = EngineRollout {
            engine: work.observer.context.engine.clone(),
            resident: work.resident.clone(),
            project: work.job.project.clone(),
        };
        let reward = work.judges.take().map(|(grader, judges)| GraderReward {
            grader,
            judges,
            resident: work.resident.clone(),
            runtime: work.observer.runtime.clone(),
        });
        let run = Run {
            tokenize: &tokenize,
            world: reward.as_ref().map(|reward| World { rollout: &rollout, reward }),
            spec: &work.job.spec,
            base: work.resident.base.clone(),
            train: &work.train,
            valid: &work.valid,
            resume: work.resume.as_ref(),
            start: work.start.as_ref(),
            experts: &work.experts,
            turns: Some(work.observer.context.engine.turns().clone()),
        };
        let result = match fits(&run, work.memory_limit) {
            Ok(()) => trainer::train(run, &mut work.observer).map_err(of_training),
            Err(stop) => Err(stop),
        };
        drop(work.observer.shown.take());
        // Nobody waits any more only when the process ends.
        _ = answer.send(result);
    };
    let spawned = std::thread::Builder::new().name("train".to_owned()).stack_size(STACK).spawn(body);
    let thread = spawned.map_err(|e| Stop::Again(anyhow::anyhow!("the training thread did not start: {e}")))?;
    match outcome.await {
        Ok(result) => result,
        Err(_) => {
            let panic = tokio::task::spawn_blocking(move || thread.join()).await;
            let text = match panic {
                Ok(Err(payload)) => panic_text(payload.as_ref()),
                _ => "no reason given".to_owned(),
            };
            Err(failed("internal", format!("training crashed: {text}"), None))
        }
    }
}

/// Refuses a run that would need more memory than there is, before it takes any.
fn fits(run: &Run, limit: Option<u64>) -> Result<(), Stop> {
    let Some(available) = memory::available(limit) else { return Ok(()) };
    let estimate = trainer::estimate(run).map_err(of_training)?;
    match memory::refusal(&estimate.memory, available) {
        None => Ok(()),
        Some(message) => Err(failed("out_of_memory", message, Some("training"))),
    }
}

fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no reason given".to_owned())
}

fn of_training(error: TrainError) -> Stop {
    match error {
        TrainError::Diverged(message) => failed("spec_diverged", message, Some("training.learning_rate")),
        TrainError::Data(message) => failed("dataset_empty", message, Some("training_file")),
        TrainError::Ungraded(message) => failed("grader_failed", message, Some("method")),
        TrainError::Checkpoint(message) => failed("internal_checkpoint", message, None),
        TrainError::Method(error) => failed("spec_invalid", error.to_string(), Some("adapter")),
        TrainError::Tensor(error) => failed("internal", error.to_string(), None),
        TrainError::Observer(error) => match error.downcast::<DbError>() {
            Ok(error) => error.into(),
            Err(error) => match error.downcast::<GradeError>() {
                // The next attempt would fail alike.
                Ok(error) => failed("spec_invalid_grader", error.to_string(), Some("method")),
                Err(error) => Stop::Again(error),
            },
        },
    }
}

/// An adapter that the job builds on.
async fn stored(context: &Context, generation: &str, param: &str) -> Result<AdapterFiles, Stop> {
    match read_adapter(&context.store, generation).await {
        Ok((_, files)) => Ok(files),
        Err(ArtifactError::Storage(StorageError::NotFound(_))) => {
            Err(failed("spec_unknown_model", format!("the adapter {generation} is not in the store"), Some(param)))
        }
        Err(error @ ArtifactError::Damaged(_)) => {
            Err(failed("internal_adapter_damaged", error.to_string(), Some(param)))
        }
        Err(error) => Err(error.into()),
    }
}

async fn dataset(context: &Context, job: &Job, resident: &Resident, file: &str, param: &str) -> Result<Vec<Row>, Stop> {
    let bytes = match context.store.get(&Key::File { id: file.to_owned() }).await {
        Ok(bytes) => bytes,
        Err(StorageError::NotFound(_)) => {
            return Err(failed("dataset_missing", format!("the file {file} was deleted"), Some(param)));
        }
        Err(error) => return Err(Stop::Again(error.into())),
    };
    let (resident, base, max) = (resident.clone(), job.spec.base.clone(), job.spec.training.max_seq_len as usize);
    let loaded = tokio::task::spawn_blocking(move || {
        let vocab = resident.base.info.vocab;
        let context = data::Context { text: &resident.text, base_id: &base, max_seq_len: max, vocab };
        data::load(Cursor::new(bytes), &context)
    });
    match loaded.await.context("reading the dataset").map_err(Stop::Again)? {
        Ok(examples) => Ok(examples),
        Err(DataError::Read(error)) => Err(Stop::Again(error.into())),
        Err(DataError::Line(line)) => {
            Err(failed(&format!("dataset_{}", line.code), format!("line {}: {}", line.line, line.message), Some(param)))
        }
        Err(error @ DataError::Empty) => Err(failed("dataset_empty", error.to_string(), Some(param))),
    }
}

/// The newest checkpoint whose parts are all there and undamaged; damaged ones are passed over with an event.
async fn latest_snapshot(context: &Context, job: &Job) -> Result<Option<Snapshot>, Stop> {
    for checkpoint in context.db.checkpoints(&job.id).await? {
        let mut files = Vec::new();
        let mut damage = None;
        for part in &checkpoint.files {
            let key = Key::Checkpoint {
                job: job.id.clone(),
                fence: checkpoint.fence,
                step: checkpoint.step as u64,
                name: part.name.clone(),
            };
            match context.store.get(&key).await {
                Ok(bytes) if sha256(&bytes) == part.sha256 => files.push((part.name.clone(), bytes.to_vec())),
                Ok(_) => damage = Some(format!("{} is damaged", part.name)),
                Err(StorageError::NotFound(_)) => damage = Some(format!("{} is missing", part.name)),
                Err(error) => return Err(Stop::Again(error.into())),
            }
        }
        let event = match damage {
            None => {
                let event = NewEvent::info(format!("Going on from the checkpoint of step {}", checkpoint.step));
                context.db.record(job, &[event], None).await?;
                return Ok(Some(Snapshot { step: checkpoint.step as u64, files }));
            }
            Some(damage) => {
                NewEvent::at_level("warn", format!("The checkpoint of step {} is not used: {damage}", checkpoint.step))
            }
        };
        context.db.record(job, &[event], None).await?;
    }
    Ok(None)
}

async fn finish(
    context: &Context,
    job: &Job,
    resident: &Resident,
    adapter: AdapterFiles,
    metrics: &Metrics,
) -> Result<(), Stop> {
    let base = &resident.base.info;
    let method = job.spec.adapter.type_name();
    let manifest = publish_adapter(&context.store, &adapter, base, method).await?;
    let csv = result_csv(context, job).await?;
    let file = id::new("file-");
    let stored = context.store.put(&Key::File { id: file.clone() }, csv.into()).await;
    let stored = stored.map_err(|e| Stop::Again(e.into()))?;
    let publication = Publication {
        adapter: AdapterRecord {
            id: id::new("adapter-"),
            project: job.project.clone(),
            model: job.output_model.clone(),
            parent: base.id.clone(),
            method: method.to_owned(),
            generation: manifest.generation,
            bytes: manifest.files.iter().map(|f| f.bytes as i64).sum(),
            created_at: now(),
            job_id: Some(job.id.clone()),
            step: None,
            virtual_tokens: job.spec.adapter.virtual_tokens() as i64,
        },
        result_file: FileRecord {
            id: file,
            project: job.project.clone(),
            filename: "step_metrics.csv".to_owned(),
            purpose: "fine-tune-results".to_owned(),
            bytes: stored.bytes as i64,
            sha256: stored.sha256,
            status: "processed".to_owned(),
            status_details: None,
            created_at: now(),
        },
        trained_tokens: metrics.trained_tokens.unwrap_or(0) as i64,
    };
    let adapter_ref = AdapterRef::from(&publication.adapter);
    context.db.succeed(job, &publication).await?;
    // It may be asked for at once.
    let (engine, resident) = (context.engine.clone(), resident.clone());
    let kept = tokio::task::spawn_blocking(move || engine.keep(&resident, &adapter_ref, &adapter)).await;
    kept.context("keeping the adapter in memory").map_err(Stop::Again)
}

/// `step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy`, a line a step.
async fn result_csv(context: &Context, job: &Job) -> Result<Vec<u8>, Stop> {
    let mut csv = csv::Writer::from_writer(Vec::new());
    let header = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"];
    let broken = |e: csv::Error| Stop::Again(e.into());
    csv.write_record(header).map_err(broken)?;
    let mut last = 0;
    loop {
        let events = context.db.events_since(&job.id, last, 1000).await?;
        let Some(newest) = events.last() else { break };
        last = newest.seq;
        for event in events.into_iter().filter(|event| event.kind == EventKind::Metrics) {
            let Some(Ok(m)) = event.data.map(serde_json::from_value::<Metrics>) else { continue };
            let cell = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
            let row = [
                m.step.to_string(),
                cell(m.train_loss),
                cell(m.train_mean_token_accuracy),
                cell(m.full_valid_loss.or(m.valid_loss)),
                cell(m.full_valid_mean_token_accuracy.or(m.valid_mean_token_accuracy)),
            ];
            csv.write_record(row).map_err(broken)?;
        }
    }
    csv.into_inner().map_err(|e| Stop::Again(anyhow::anyhow!("{e}")))
}
