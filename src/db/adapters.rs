//! Named adapters.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, Page};
use crate::domain::AdapterRecord;

fn adapter(row: &AnyRow) -> Result<AdapterRecord, DbError> {
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
    })
}

pub(super) async fn insert(tx: &mut sqlx::Transaction<'_, sqlx::Any>, a: &AdapterRecord) -> Result<(), DbError> {
    let sql = "INSERT INTO adapters (id, project, model, parent, method, generation, bytes, created_at, job_id, step) \
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (project, model) DO UPDATE SET \
               generation = excluded.generation, bytes = excluded.bytes";
    let query = sqlx::query(sql).bind(&a.id).bind(&a.project).bind(&a.model).bind(&a.parent).bind(&a.method);
    let query = query.bind(&a.generation).bind(a.bytes).bind(a.created_at).bind(&a.job_id).bind(a.step);
    query.execute(&mut **tx).await?;
    Ok(())
}

impl Db {
    /// An import.
    pub async fn insert_adapter(&self, adapter: &AdapterRecord) -> Result<(), DbError> {
        let mut tx = self.pool.begin().await?;
        insert(&mut tx, adapter).await?;
        self.audit(&mut tx, &adapter.project, "adapter.create", &adapter.id).await?;
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
        let anchor = match after {
            Some(id) => Some(self.adapter(project, id).await?),
            None => None,
        };
        let sql = "SELECT * FROM adapters WHERE project = $1 \
                   AND ($2 = '' OR created_at < $3 OR (created_at = $3 AND id < $2)) \
                   ORDER BY created_at DESC, id DESC LIMIT $4";
        let query = sqlx::query(sql).bind(project).bind(anchor.as_ref().map_or("", |a| a.id.as_str()));
        let query = query.bind(anchor.as_ref().map_or(0, |a| a.created_at)).bind(limit as i64 + 1);
        let rows = query.fetch_all(&self.pool).await?;
        Ok(Page::of(rows.iter().map(adapter).collect::<Result<_, _>>()?, limit))
    }

    /// Forgets a name; answers what it was, and whether another name still points at its generation.
    pub async fn delete_adapter(&self, project: &str, name: &str) -> Result<(AdapterRecord, bool), DbError> {
        let record = self.adapter(project, name).await?;
        let mut tx = self.pool.begin().await?;
        sqlx::query("DELETE FROM adapters WHERE id = $1").bind(&record.id).execute(&mut *tx).await?;
        self.audit(&mut tx, project, "adapter.delete", &record.model).await?;
        let query = sqlx::query("SELECT count(*) AS n FROM adapters WHERE generation = $1").bind(&record.generation);
        let left: i64 = query.fetch_one(&mut *tx).await?.try_get("n")?;
        tx.commit().await?;
        Ok((record, left > 0))
    }
}
