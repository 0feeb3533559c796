//! Checkpoints of jobs: where their parts lie, and the name under which they are served.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, json};
use crate::domain::{ManifestFile, Metrics};

#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointRecord {
    /// `ftckpt_…`
    pub id: String,
    pub job_id: String,
    pub created_at: i64,
    /// The attempt that wrote it: part of its key in the store.
    pub fence: i64,
    pub step: i64,
    /// The servable name: `<output model>:ckpt-step-N`.
    pub model: String,
    pub files: Vec<ManifestFile>,
    pub metrics: Metrics,
}

fn checkpoint(row: &AnyRow) -> Result<CheckpointRecord, DbError> {
    Ok(CheckpointRecord {
        id: row.try_get("id")?,
        job_id: row.try_get("job_id")?,
        created_at: row.try_get("created_at")?,
        fence: row.try_get("fence")?,
        step: row.try_get("step")?,
        model: row.try_get("model")?,
        files: json(row, "files")?,
        metrics: json(row, "metrics")?,
    })
}

impl Db {
    /// A job's checkpoints, newest first. The caller has checked whose job it is.
    pub async fn checkpoints(&self, job: &str) -> Result<Vec<CheckpointRecord>, DbError> {
        let query = sqlx::query("SELECT * FROM checkpoints WHERE job_id = $1 ORDER BY step DESC").bind(job);
        query.fetch_all(&self.pool).await?.iter().map(checkpoint).collect()
    }
}
