//! API keys, by their hash.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, json, to_json};
use crate::domain::ApiKey;

fn key(row: &AnyRow) -> Result<ApiKey, DbError> {
    Ok(ApiKey {
        id: row.try_get("id")?,
        project: row.try_get("project")?,
        sha256: row.try_get("sha256")?,
        scopes: json(row, "scopes")?,
        created_at: row.try_get("created_at")?,
        revoked_at: row.try_get("revoked_at")?,
    })
}

impl Db {
    /// Keeps a key; one with the same hash stays as it is.
    pub async fn insert_key(&self, key: &ApiKey) -> Result<(), DbError> {
        let mut tx = self.pool.begin().await?;
        let sql = "INSERT INTO keys (id, project, sha256, scopes, created_at) VALUES ($1, $2, $3, $4, $5) \
                   ON CONFLICT (sha256) DO NOTHING";
        let query = sqlx::query(sql).bind(&key.id).bind(&key.project).bind(&key.sha256);
        query.bind(to_json(&key.scopes)?).bind(key.created_at).execute(&mut *tx).await?;
        self.audit(&mut tx, &key.project, "key.create", &key.id).await?;
        Ok(tx.commit().await?)
    }

    /// The key with this hash, unless it was revoked.
    pub async fn key(&self, sha256: &str) -> Result<ApiKey, DbError> {
        let query = sqlx::query("SELECT * FROM keys WHERE sha256 = $1 AND revoked_at IS NULL").bind(sha256);
        key(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    pub async fn has_keys(&self) -> Result<bool, DbError> {
        let row = sqlx::query("SELECT count(*) AS n FROM keys WHERE revoked_at IS NULL").fetch_one(&self.pool).await?;
        Ok(row.try_get::<i64, _>("n")? > 0)
    }
}
