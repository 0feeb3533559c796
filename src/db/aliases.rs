//! Aliases, moved by compare-and-swap.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, Page, adapters::adapter};
use crate::domain::{AdapterRecord, AliasRecord, Caller, Expected};

const SELECT: &str = "SELECT aliases.project, aliases.name, adapters.model, aliases.generation, aliases.updated_at \
                      FROM aliases JOIN adapters ON adapters.id = aliases.adapter_id";

fn alias(row: &AnyRow) -> Result<AliasRecord, DbError> {
    Ok(AliasRecord {
        project: row.try_get("project")?,
        name: row.try_get("name")?,
        model: row.try_get("model")?,
        generation: row.try_get("generation")?,
        updated_at: row.try_get("updated_at")?,
    })
}

impl Db {
    /// Points an alias at an adapter if what is expected holds; of many who expect the same, one succeeds.
    pub async fn move_alias(
        &self,
        caller: &Caller,
        name: &str,
        to: &AdapterRecord,
        expected: &Expected,
    ) -> Result<(), DbError> {
        let insert = "INSERT INTO aliases (project, name, adapter_id, generation, updated_at) \
                      VALUES ($1, $2, $3, $4, {now}) ON CONFLICT (project, name) DO";
        let set = "adapter_id = $3, generation = $4, updated_at = {now}";
        let sql = match expected {
            Expected::Anything => format!("{insert} UPDATE SET {set}"),
            Expected::Absent => format!("{insert} NOTHING"),
            Expected::Generation(_) => {
                format!("UPDATE aliases SET {set} WHERE project = $1 AND name = $2 AND generation = $5")
            }
        };
        let mut tx = self.begin().await?;
        let query = sqlx::query(self.sql(&sql)).bind(&caller.project).bind(name).bind(&to.id).bind(&to.generation);
        let query = match expected {
            Expected::Generation(generation) => query.bind(generation),
            Expected::Anything | Expected::Absent => query,
        };
        if query.execute(&mut *tx).await?.rows_affected() == 0 {
            return Err(DbError::Conflict(format!("the alias {name} does not stand where it was expected")));
        }
        self.audit(&mut tx, &caller.key, &caller.project, "alias.move", name).await?;
        Ok(tx.commit().await?)
    }

    pub async fn alias(&self, project: &str, name: &str) -> Result<AliasRecord, DbError> {
        let sql = self.sql(&format!("{SELECT} WHERE aliases.project = $1 AND aliases.name = $2"));
        let query = sqlx::query(sql).bind(project).bind(name);
        alias(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    /// By name, behind the alias `after`.
    pub async fn aliases(&self, project: &str, after: &str, limit: usize) -> Result<Page<AliasRecord>, DbError> {
        let sql = format!("{SELECT} WHERE aliases.project = $1 AND aliases.name > $2 ORDER BY aliases.name LIMIT $3");
        let query = sqlx::query(self.sql(&sql)).bind(project).bind(after).bind(limit as i64 + 1);
        let rows = query.fetch_all(&self.pool).await?;
        Ok(Page::of(rows.iter().map(alias).collect::<Result<_, _>>()?, limit))
    }

    /// The adapter that an alias means now.
    pub async fn aliased(&self, project: &str, name: &str) -> Result<AdapterRecord, DbError> {
        let sql = "SELECT adapters.* FROM adapters JOIN aliases ON aliases.adapter_id = adapters.id \
                   WHERE aliases.project = $1 AND aliases.name = $2";
        let query = sqlx::query(sql).bind(project).bind(name);
        adapter(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    pub async fn delete_alias(&self, caller: &Caller, name: &str) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        let query = sqlx::query("DELETE FROM aliases WHERE project = $1 AND name = $2");
        if query.bind(&caller.project).bind(name).execute(&mut *tx).await?.rows_affected() == 0 {
            return Err(DbError::NotFound);
        }
        self.audit(&mut tx, &caller.key, &caller.project, "alias.delete", name).await?;
        Ok(tx.commit().await?)
    }
}
