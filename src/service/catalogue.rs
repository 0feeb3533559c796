//! Names of models: bases, and adapters on them.

use serde::Serialize;
use utoipa::ToSchema;

use tokio::sync::mpsc;

use super::{Fault, Problem, Service};
use crate::{
    db::DbError,
    domain::{AdapterRecord, Caller},
    inference::{EngineError, Lease, Output, Request, Resident},
    jobs::now,
};

/// What a request's `model` means.
#[derive(Clone)]
pub struct Model {
    pub name: String,
    pub resident: Resident,
    /// The adapter, none for the base itself.
    pub adapter: Option<AdapterRecord>,
    /// The adapter itself where it is in no store: one that is being trained.
    pub lease: Option<Lease>,
}

/// An entry of `GET /v1/models`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelObject {
    /// What requests put into `model`.
    pub id: String,
    /// Always `model`.
    pub object: String,
    /// Unix seconds.
    pub created: i64,
    pub owned_by: String,
    /// The base of a tuned model; null for a base.
    pub parent: Option<String>,
    /// The adapter's identity: SHA-256 of its files; null for a base.
    pub adapter_generation: Option<String>,
    /// The longest sequence, in tokens; those that an adapter puts before the text are taken off.
    pub context_length: u64,
}

impl Model {
    /// The longest text, in tokens.
    pub fn context(&self) -> u64 {
        context(&self.resident, self.adapter.as_ref())
    }

    /// The longest text that begins with a prompt of this length.
    pub fn longest(&self, prompt: usize) -> u64 {
        let taken = self.adapter.as_ref().map_or(0, taken);
        self.resident.base.info.longest(prompt + taken).saturating_sub(taken) as u64
    }
}

fn context(resident: &Resident, adapter: Option<&AdapterRecord>) -> u64 {
    resident.base.info.context.saturating_sub(adapter.map_or(0, taken)) as u64
}

/// Places before the text.
fn taken(record: &AdapterRecord) -> usize {
    usize::try_from(record.virtual_tokens).unwrap_or(0)
}

impl ModelObject {
    fn base(resident: &Resident, started: i64) -> Self {
        let info = &resident.base.info;
        Self {
            id: info.id.clone(),
            object: "model".to_owned(),
            created: started,
            owned_by: "system".to_owned(),
            parent: None,
            adapter_generation: None,
            context_length: context(resident, None),
        }
    }

    fn adapter(record: &AdapterRecord, resident: &Resident) -> Self {
        Self {
            id: record.model.clone(),
            object: "model".to_owned(),
            created: record.created_at,
            owned_by: record.project.clone(),
            parent: Some(record.parent.clone()),
            adapter_generation: Some(record.generation.clone()),
            context_length: context(resident, Some(record)),
        }
    }
}

/// Behind a job's id or the name of its model: what it has trained so far.
const LIVE: &str = ":live";

/// When bases say they were made: a fixed time, since they have none of their own.
const EPOCH: i64 = 1_700_000_000;

impl Service {
    pub async fn model(&self, project: &str, name: &str) -> Result<Model, Problem> {
        if let Some(resident) = self.bases.get(name) {
            return Ok(Model { name: name.to_owned(), resident: resident.clone(), adapter: None, lease: None });
        }
        let found = match self.db.adapter(project, name).await {
            Err(DbError::NotFound) => self.db.aliased(project, name).await,
            found => found,
        };
        let record = found.map_err(|error| match error {
            DbError::NotFound if name.ends_with(LIVE) => {
                let message = format!("{name} answers requests and is nothing else: name a checkpoint");
                Problem::new(Fault::NotFound, "model_not_stored", message).at("model")
            }
            DbError::NotFound => Problem::model_not_found(name),
            error => error.into(),
        })?;
        let resident = self.bases.get(&record.parent).ok_or_else(|| Problem::model_not_found(name))?;
        Ok(Model { name: record.model.clone(), resident: resident.clone(), adapter: Some(record), lease: None })
    }

    /// What `name` means where something is to be computed: any model, or the adapter of a job that runs here, as it is
    /// now.
    pub async fn served(&self, project: &str, name: &str) -> Result<Model, Problem> {
        let Some(run) = name.strip_suffix(LIVE) else { return self.model(project, name).await };
        let Some(run) = self.engine.lives().get(project, run) else {
            let message = format!("{name}: {run} is not being trained in this process");
            return Err(Problem::new(Fault::NotFound, "model_not_live", message).at("model"));
        };
        let made = run.clone();
        let made = tokio::task::spawn_blocking(move || made.current()).await.map_err(Problem::internal)?;
        let (step, made) = made.map_err(Problem::internal)?;
        let record = AdapterRecord {
            id: run.job.clone(),
            project: project.to_owned(),
            model: name.to_owned(),
            parent: run.resident.base.info.id.clone(),
            method: run.method.clone(),
            generation: made.adapter.generation,
            bytes: made.adapter.bytes as i64,
            created_at: now(),
            job_id: Some(run.job.clone()),
            step: Some(step as i64),
            virtual_tokens: made.adapter.virtual_tokens as i64,
        };
        let (resident, lease) = (run.resident.clone(), Some(made.lease));
        Ok(Model { name: name.to_owned(), resident, adapter: Some(record), lease })
    }

    /// Queues a request for a model.
    pub(super) fn submit(&self, model: &Model, request: Request) -> Result<mpsc::Receiver<Output>, EngineError> {
        match &model.lease {
            Some(lease) => self.engine.submit_with(request, lease.clone()),
            None => self.engine.submit(request),
        }
    }

    pub async fn model_object(&self, project: &str, name: &str) -> Result<ModelObject, Problem> {
        let model = self.model(project, name).await?;
        Ok(match &model.adapter {
            Some(record) => ModelObject::adapter(record, &model.resident),
            None => ModelObject::base(&model.resident, EPOCH),
        })
    }

    /// Bases first, then every adapter of the project, newest first.
    pub async fn model_objects(&self, project: &str) -> Result<Vec<ModelObject>, Problem> {
        let mut all: Vec<ModelObject> = self.bases.iter().map(|r| ModelObject::base(r, EPOCH)).collect();
        let mut after = None;
        loop {
            let page = self.db.adapters(project, after.as_deref(), 1000).await?;
            let known = page.data.iter().filter_map(|record| Some((record, self.bases.get(&record.parent)?)));
            all.extend(known.map(|(record, resident)| ModelObject::adapter(record, resident)));
            match page.data.last().filter(|_| page.has_more) {
                Some(last) => after = Some(last.id.clone()),
                None => return Ok(all),
            }
        }
    }

    /// Forgets a tuned model's name, and its files when no other name has them.
    pub async fn delete_model(&self, caller: &Caller, name: &str) -> Result<(), Problem> {
        if self.bases.get(name).is_some() {
            let message = format!("{name} is a base: only its operator can remove it");
            return Err(Problem::new(Fault::Forbidden, "base_model", message).at("model"));
        }
        let (record, in_use) = self.db.delete_adapter(caller, name).await.map_err(|error| match error {
            DbError::NotFound => Problem::model_not_found(name),
            error => error.into(),
        })?;
        if !in_use {
            self.engine.evict(&record.generation);
            self.delete_adapter_files(&record.generation).await?;
        }
        Ok(())
    }
}
