//! Names of models: bases, and adapters on them.

use serde::Serialize;
use utoipa::ToSchema;

use super::{Problem, Service};
use crate::{
    db::DbError,
    domain::{AdapterRecord, Caller},
    inference::{AdapterRef, Resident},
};

/// What a request's `model` means.
#[derive(Clone)]
pub struct Model {
    pub name: String,
    pub resident: Resident,
    /// The adapter, none for the base itself.
    pub adapter: Option<AdapterRecord>,
}

impl Model {
    /// The adapter as the engine is asked for it.
    pub fn adapter_ref(&self) -> Option<AdapterRef> {
        let adapter = self.adapter.as_ref()?;
        Some(AdapterRef { generation: adapter.generation.clone(), bytes: u64::try_from(adapter.bytes).unwrap_or(0) })
    }
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
    /// The longest sequence, in tokens.
    pub context_length: u64,
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
            context_length: info.context as u64,
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
            context_length: resident.base.info.context as u64,
        }
    }
}

/// When bases say they were made: a fixed time, since they have none of their own.
const EPOCH: i64 = 1_700_000_000;

impl Service {
    pub async fn model(&self, project: &str, name: &str) -> Result<Model, Problem> {
        if let Some(resident) = self.bases.get(name) {
            return Ok(Model { name: name.to_owned(), resident: resident.clone(), adapter: None });
        }
        let record = self.db.adapter(project, name).await.map_err(|error| match error {
            DbError::NotFound => Problem::model_not_found(name),
            error => error.into(),
        })?;
        let resident = self.bases.get(&record.parent).ok_or_else(|| Problem::model_not_found(name))?;
        Ok(Model { name: record.model.clone(), resident: resident.clone(), adapter: Some(record) })
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
            return Err(Problem::new(super::Fault::Forbidden, "base_model", message).at("model"));
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
