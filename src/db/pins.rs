//! Adapters that are kept at hand.

use std::collections::HashSet;

use sqlx::Row;

use super::{Db, DbError, adapters::adapter};
use crate::domain::{AdapterRecord, Caller};

impl Db {
    /// Pins an adapter, unless all that are pinned would then have more than `most` bytes.
    pub async fn pin(&self, caller: &Caller, record: &AdapterRecord, most: u64) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        let sql = "INSERT INTO pins (adapter_id) VALUES ($1) ON CONFLICT (adapter_id) DO NOTHING";
        if sqlx::query(sql).bind(&record.id).execute(&mut *tx).await?.rows_affected() == 0 {
            return Ok(());
        }
        // Names that share a generation share its memory.
        let sql = "SELECT CAST(coalesce(sum(bytes), 0) AS BIGINT) AS held FROM (SELECT DISTINCT generation, bytes \
                   FROM adapters JOIN pins ON pins.adapter_id = adapters.id) AS pinned";
        let held: i64 = sqlx::query(sql).fetch_one(&mut *tx).await?.try_get("held")?;
        if u64::try_from(held).unwrap_or(0) > most {
            let message = format!("pinned adapters would take {held} bytes, above the limit of {most}");
            return Err(DbError::Conflict(message));
        }
        self.audit(&mut tx, &caller.key, &caller.project, "adapter.pin", &record.id).await?;
        Ok(tx.commit().await?)
    }

    pub async fn unpin(&self, caller: &Caller, record: &AdapterRecord) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        let query = sqlx::query("DELETE FROM pins WHERE adapter_id = $1").bind(&record.id);
        if query.execute(&mut *tx).await?.rows_affected() > 0 {
            self.audit(&mut tx, &caller.key, &caller.project, "adapter.unpin", &record.id).await?;
        }
        Ok(tx.commit().await?)
    }

    /// Every pinned adapter, of all projects.
    pub async fn pins(&self) -> Result<Vec<AdapterRecord>, DbError> {
        let sql = "SELECT adapters.* FROM adapters JOIN pins ON pins.adapter_id = adapters.id";
        sqlx::query(sql).fetch_all(&self.pool).await?.iter().map(adapter).collect()
    }

    /// The ids of a project's pinned adapters.
    pub async fn pinned(&self, project: &str) -> Result<HashSet<String>, DbError> {
        let sql = "SELECT id FROM adapters JOIN pins ON pins.adapter_id = adapters.id WHERE project = $1";
        let rows = sqlx::query(sql).bind(project).fetch_all(&self.pool).await?;
        rows.iter().map(|row| Ok(row.try_get("id")?)).collect()
    }
}
