//! What a job will need, and which method fits its data and this machine.

use std::io::Cursor;

use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use utoipa::ToSchema;

use super::{Problem, Service, advice::merit, catalogue::Model, jobs::Planned};
use crate::{
    data,
    domain::{Caller, Job, MethodSpec, RunEstimate, TrainSpec, Training},
    inference::{Resident, read_adapter},
    jobs::memory,
    methods::{AdapterFiles, MethodError},
    storage::Key,
    trainer::{self, Run, TrainError},
};

/// Estimates take a core and memory: one at a time.
static ONE: Semaphore = Semaphore::const_new(1);

/// `POST /v1/fine_tuning/estimate`
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Estimate {
    /// Always `fine_tuning.estimate`.
    pub object: String,
    pub model: String,
    /// As a job would have them, every `auto` filled in.
    pub adapter: Value,
    pub training: Training,
    #[serde(flatten)]
    pub run: RunEstimate,
    /// By one pass on this machine as busy as it is now.
    pub tokens_per_second: f64,
    pub seconds: f64,
    /// Bytes of the resident base, which is there already.
    pub base_memory: u64,
    /// Bytes that this server has for a job now; null where it cannot tell.
    pub available_memory: Option<u64>,
    /// Whether the job would start here.
    pub fits: bool,
    /// Methods with their defaults for this data, the best first. `adapter.type: "auto"` takes the first.
    pub recommendations: Vec<Recommendation>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Recommendation {
    /// What `adapter` of a job takes.
    pub adapter: Value,
    pub reason: String,
    pub trainable_parameters: u64,
    pub adapter_bytes: u64,
    /// Peak bytes while training.
    pub peak_memory: u64,
    pub fits: bool,
}

/// What methods are compared on.
pub(super) struct Ground {
    pub resident: Resident,
    pub rows: Vec<data::Row>,
}

/// The adapters that a run begins with.
#[derive(Default)]
struct Origin {
    start: Option<AdapterFiles>,
    experts: Vec<AdapterFiles>,
}

impl Service {
    /// The same body as a job's; nothing is queued.
    pub async fn estimate(&self, caller: &Caller, body: Map<String, Value>) -> Result<Estimate, Problem> {
        let Planned { job, model, .. } = self.planned(caller, body).await?;
        let ground = self.ground(&model.resident, &job.training_file, job.spec.training.max_seq_len).await?;
        let valid = match &job.validation_file {
            Some(file) => self.ground(&model.resident, file, job.spec.training.max_seq_len).await?.rows,
            None => Vec::new(),
        };
        let mut origin = Origin::default();
        match &job.spec.continue_from {
            Some(generation) => origin.start = Some(read_adapter(&self.store, generation).await?.1),
            None => {
                for generation in job.spec.adapter.sources() {
                    origin.experts.push(read_adapter(&self.store, generation).await?.1);
                }
            }
        }
        let available = memory::available(self.memory_limit);
        let _turn = ONE.acquire().await.map_err(Problem::internal)?;
        let base_memory = model.resident.base.bytes();
        let made = tokio::task::spawn_blocking(move || {
            let run = with(&job.spec, &ground, &valid, &origin, trainer::estimate)?;
            let speed = with(&job.spec, &ground, &valid, &origin, trainer::speed)?;
            let recommendations =
                if origin.start.is_none() { recommend(&job, &ground, &run, available) } else { Vec::new() };
            Ok::<_, TrainError>((job, run, speed, recommendations))
        });
        let (job, run, tokens_per_second, recommendations) =
            made.await.map_err(Problem::internal)?.map_err(of_training)?;
        Ok(Estimate {
            object: "fine_tuning.estimate".to_owned(),
            model: job.model,
            adapter: serde_json::to_value(&job.spec.adapter).map_err(Problem::internal)?,
            training: job.spec.training,
            tokens_per_second,
            seconds: run.total_tokens as f64 / tokens_per_second,
            fits: available.is_none_or(|available| run.memory.peak <= available),
            run,
            base_memory,
            available_memory: available,
            recommendations,
        })
    }

    /// The method that `adapter.type: "auto"` takes.
    pub(super) async fn best(&self, model: &Model, job: &Job) -> Result<MethodSpec, Problem> {
        let ground = self.ground(&model.resident, &job.training_file, job.spec.training.max_seq_len).await?;
        let (available, job) = (memory::available(self.memory_limit), job.clone());
        let _turn = ONE.acquire().await.map_err(Problem::internal)?;
        let made = tokio::task::spawn_blocking(move || {
            let run = with(&job.spec, &ground, &[], &Origin::default(), trainer::estimate)?;
            Ok(recommend(&job, &ground, &run, available))
        });
        let made = made.await.map_err(Problem::internal)?.map_err(of_training)?;
        match made.first() {
            Some(best) => Ok(MethodSpec::from_json(&best.adapter)?),
            None => Err(Problem::invalid("adapter.type", "spec_no_match", "no method can be trained on this base")),
        }
    }

    async fn ground(&self, resident: &Resident, file: &str, max_seq_len: u64) -> Result<Ground, Problem> {
        let bytes = self.store.get(&Key::File { id: file.to_owned() }).await?;
        let resident = resident.clone();
        let loaded = tokio::task::spawn_blocking(move || {
            let info = &resident.base.info;
            let context = data::Context {
                text: &resident.text,
                base_id: &info.id,
                max_seq_len: max_seq_len as usize,
                vocab: info.vocab,
            };
            data::load(Cursor::new(bytes), &context).map(|rows| Ground { rows, resident: resident.clone() })
        });
        let loaded = loaded.await.map_err(Problem::internal)?;
        loaded.map_err(|error| Problem::invalid("training_file", "dataset_invalid", error.to_string()))
    }
}

/// Asks the trainer about a run.
fn with<T>(
    spec: &TrainSpec,
    ground: &Ground,
    valid: &[data::Row],
    origin: &Origin,
    ask: fn(&Run) -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    let text = &ground.resident.text;
    let tokenize = |words: &str| {
        let ids = text.tokenizer.encode(words, false);
        ids.map_err(|error| MethodError::Mismatch(error.to_string()))
    };
    let base = ground.resident.base.clone();
    ask(&Run {
        spec,
        base,
        train: &ground.rows,
        valid,
        resume: None,
        start: origin.start.as_ref(),
        experts: &origin.experts,
        tokenize: &tokenize,
        world: None,
        turns: None,
    })
}

/// Every method that can run on this base, the best for the data first; those that do not fit come last.
fn recommend(job: &Job, ground: &Ground, chosen: &RunEstimate, available: Option<u64>) -> Vec<Recommendation> {
    let base = &ground.resident.base.info;
    let mut found: Vec<(u32, Recommendation)> = MethodSpec::all()
        .into_iter()
        .filter(|method| method.check(base).is_ok())
        .filter_map(|mut method| method.fit(base, chosen.steps).ok().map(|()| method))
        .filter_map(|method| {
            let (merit, reason) = merit(&method, base, chosen);
            let spec = TrainSpec { adapter: method, ..job.spec.clone() };
            let run = if spec.adapter == job.spec.adapter {
                chosen.clone()
            } else {
                // What cannot be built here is not recommended.
                with(&spec, ground, &[], &Origin::default(), trainer::estimate).ok()?
            };
            let recommendation = Recommendation {
                adapter: json!({"type": spec.adapter.type_name()}),
                reason,
                trainable_parameters: run.trainable_parameters,
                adapter_bytes: run.adapter_bytes,
                peak_memory: run.memory.peak,
                fits: available.is_none_or(|available| run.memory.peak <= available),
            };
            Some((merit, recommendation))
        })
        .collect();
    found.sort_by_key(|(merit, one)| (!one.fits, std::cmp::Reverse(*merit), one.trainable_parameters));
    found.into_iter().map(|(_, one)| one).collect()
}

fn of_training(error: TrainError) -> Problem {
    match error {
        TrainError::Data(message) => Problem::invalid("training_file", "dataset_empty", message),
        TrainError::Method(error) => Problem::from(error).at("adapter"),
        error => Problem::internal(error),
    }
}
