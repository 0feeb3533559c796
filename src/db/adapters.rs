//! Named adapters.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, Once, Page, Tx};
use crate::domain::{AdapterRecord, Caller};

pub(super) fn adapter(row: &AnyRow) -> Result<AdapterRecord, DbError> {
    Ok(AdapterRecord {
        id: row.try_get("id")?,
        project: row.try_get("project")?,
        model: row.try_get("model")?,
        parent: row.try_get("parent")?,
        method: row.try_get("method")?,
        generation: row.try_get("generation")?,
        bytes: row.try_get("bytes")?,
        created_at: row.try_get("created_at")?,
        job_id: row.try_get("job_id")?,
        step: row.try_get("step")?,
        virtual_tokens: row.try_get("virtual_tokens")?,
    })
}

/// A name is given once. Only a checkpoint that a later attempt repeats is replaced, by its own job.
pub(super) async fn insert(tx: &mut Tx, a: &AdapterRecord) -> Result<(), DbError> {
    let sql = "INSERT INTO adapters (id, project, model, parent, method, generation, bytes, created_at, job_id, step, \
               virtual_tokens) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT (project, model) DO UPDATE SET \
               generation = excluded.generation, bytes = excluded.bytes \
               WHERE adapters.job_id = excluded.job_id AND adapters.step = excluded.step";
    let query = sqlx::query(sql).bind(&a.id).bind(&a.project).bind(&a.model).bind(&a.parent).bind(&a.method);
    let query =
        query.bind(&a.generation).bind(a.bytes).bind(a.created_at).bind(&a.job_id).bind(a.step).bind(a.virtual_tokens);
    match query.execute(&mut **tx).await?.rows_affected() {
        0 => Err(DbError::Conflict(format!("the model name {} is taken", a.model))),
        _ => Ok(()),
    }
}

impl Db {
    /// An import.
    pub async fn insert_adapter(
        &self,
        actor: &str,
        adapter: &AdapterRecord,
        once: Option<&Once>,
    ) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.keep_answer(&mut tx, &adapter.project, once, adapter).await?;
        insert(&mut tx, adapter).await?;
        self.audit(&mut tx, actor, &adapter.project, "adapter.create", &adapter.id).await?;
        Ok(tx.commit().await?)
    }

    /// By its id or its model name.
    pub async fn adapter(&self, project: &str, name: &str) -> Result<AdapterRecord, DbError> {
        let sql = "SELECT * FROM adapters WHERE project = $1 AND (id = $2 OR model = $2)";
        let query = sqlx::query(sql).bind(project).bind(name);
        adapter(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    /// Newest first, after the adapter with id `after`.
    pub async fn adapters(
        &self,
        project: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<AdapterRecord>, DbError> {
        let before = match after {
            Some(id) => self.place("adapters", project, &self.adapter(project, id).await?.id).await?,
            None => i64::MAX,
        };
        let sql = self.sql("SELECT * FROM adapters WHERE project = $1 AND {seq} < $2 ORDER BY {seq} DESC LIMIT $3");
        let query = sqlx::query(sql).bind(project).bind(before).bind(limit as i64 + 1);
        let rows = query.fetch_all(&self.pool).await?;
        Ok(Page::of(rows.iter().map(adapter).collect::<Result<_, _>>()?, limit))
    }

    /// Forgets a name; answers what it was, and whether another name still points at its generation.
    pub async fn delete_adapter(&self, caller: &Caller, name: &str) -> Result<(AdapterRecord, bool), DbError> {
        let project = &caller.project;
        let record = self.adapter(project, name).await?;
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM adapters WHERE id = $1").bind(&record.id).execute(&mut *tx).await?;
        self.audit(&mut tx, &caller.key, project, "adapter.delete", &record.model).await?;
        let query = sqlx::query("SELECT count(*) AS n FROM adapters WHERE generation = $1").bind(&record.generation);
        let left: i64 = query.fetch_one(&mut *tx).await?.try_get("n")?;
        tx.commit().await?;
        Ok((record, left > 0))
    }
}
