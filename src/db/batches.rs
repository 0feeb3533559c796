//! Batches as their users see and steer them.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, Once, Page, json, optional_json, to_json};
use crate::domain::{BatchRecord, BatchStatus, Caller, Endpoint};

pub(super) fn batch(row: &AnyRow) -> Result<BatchRecord, DbError> {
    let (status, endpoint): (String, String) = (row.try_get("status")?, row.try_get("endpoint")?);
    Ok(BatchRecord {
        id: row.try_get("id")?,
        project: row.try_get("project")?,
        endpoint: Endpoint::parse(&endpoint).ok_or_else(|| DbError::Corrupt(format!("endpoint {endpoint}")))?,
        input_file: row.try_get("input_file")?,
        completion_window: row.try_get("completion_window")?,
        status: BatchStatus::parse(&status).ok_or_else(|| DbError::Corrupt(format!("status {status}")))?,
        errors: json(row, "errors")?,
        model: row.try_get("model")?,
        metadata: optional_json(row, "metadata")?,
        output_file: row.try_get("output_file")?,
        error_file: row.try_get("error_file")?,
        total: row.try_get("total")?,
        completed: row.try_get("completed")?,
        failed: row.try_get("failed")?,
        input_tokens: row.try_get("input_tokens")?,
        output_tokens: row.try_get("output_tokens")?,
        created_at: row.try_get("created_at")?,
        expires_at: row.try_get("expires_at")?,
        in_progress_at: row.try_get("in_progress_at")?,
        finalizing_at: row.try_get("finalizing_at")?,
        completed_at: row.try_get("completed_at")?,
        failed_at: row.try_get("failed_at")?,
        expired_at: row.try_get("expired_at")?,
        cancelling_at: row.try_get("cancelling_at")?,
        cancelled_at: row.try_get("cancelled_at")?,
        fence: row.try_get("fence")?,
    })
}

impl Db {
    pub async fn insert_batch(&self, actor: &str, new: &BatchRecord, once: Option<&Once>) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.keep_answer(&mut tx, &new.project, once, new).await?;
        let sql = "INSERT INTO batches (id, project, endpoint, input_file, completion_window, status, errors, metadata, \
                   total, completed, failed, input_tokens, output_tokens, created_at, expires_at, fence, \
                   barren_attempts) VALUES ($1, $2, $3, $4, $5, $6, '[]', $7, 0, 0, 0, 0, 0, $8, $9, 0, 0)";
        let query = sqlx::query(sql).bind(&new.id).bind(&new.project).bind(new.endpoint.path()).bind(&new.input_file);
        let query = query.bind(&new.completion_window).bind(new.status.as_str());
        let query = query.bind(new.metadata.as_ref().map(to_json).transpose()?);
        query.bind(new.created_at).bind(new.expires_at).execute(&mut *tx).await?;
        self.audit(&mut tx, actor, &new.project, "batch.create", &new.id).await?;
        Ok(tx.commit().await?)
    }

    pub async fn batch(&self, project: &str, id: &str) -> Result<BatchRecord, DbError> {
        let query = sqlx::query("SELECT * FROM batches WHERE project = $1 AND id = $2").bind(project).bind(id);
        batch(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    /// Newest first, after the batch `after`.
    pub async fn batches(
        &self,
        project: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<BatchRecord>, DbError> {
        let before = match after {
            Some(id) => self.place("batches", project, id).await?,
            None => i64::MAX,
        };
        let sql = self.sql("SELECT * FROM batches WHERE project = $1 AND {seq} < $2 ORDER BY {seq} DESC LIMIT $3");
        let query = sqlx::query(sql).bind(project).bind(before).bind(limit as i64 + 1);
        let rows = query.fetch_all(&self.pool).await?;
        Ok(Page::of(rows.iter().map(batch).collect::<Result<_, _>>()?, limit))
    }

    /// Whoever runs it stops within a moment. Cancelling twice changes nothing.
    pub async fn cancel_batch(&self, caller: &Caller, id: &str) -> Result<BatchRecord, DbError> {
        let mut tx = self.begin().await?;
        let sql = self.sql("SELECT * FROM batches WHERE project = $1 AND id = $2 {lock}");
        let query = sqlx::query(sql).bind(&caller.project).bind(id);
        let now = batch(&query.fetch_optional(&mut *tx).await?.ok_or(DbError::NotFound)?)?;
        match now.status {
            BatchStatus::Validating | BatchStatus::InProgress => {}
            BatchStatus::Cancelling => return Ok(now),
            status => {
                return Err(DbError::Conflict(format!("a batch that is {} cannot be cancelled", status.as_str())));
            }
        }
        let sql = self.sql("UPDATE batches SET status = 'cancelling', cancelling_at = {now} WHERE id = $1 RETURNING *");
        let changed = batch(&sqlx::query(sql).bind(id).fetch_one(&mut *tx).await?)?;
        self.audit(&mut tx, &caller.key, &caller.project, "batch.cancel", id).await?;
        tx.commit().await?;
        Ok(changed)
    }
}
