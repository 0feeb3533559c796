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

/// Who acts on the command line.
const OPERATOR: &str = "operator";

impl Db {
    /// Keeps a key; one with the same hash stays as it is. Only the operator makes and revokes keys.
    pub async fn insert_key(&self, key: &ApiKey) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        let sql = "INSERT INTO keys (id, project, sha256, scopes, created_at) VALUES ($1, $2, $3, $4, $5) \
                   ON CONFLICT (sha256) DO NOTHING";
        let query = sqlx::query(sql).bind(&key.id).bind(&key.project).bind(&key.sha256);
        let made = query.bind(to_json(&key.scopes)?).bind(key.created_at).execute(&mut *tx).await?;
        if made.rows_affected() > 0 {
            self.audit(&mut tx, OPERATOR, &key.project, "key.create", &key.id).await?;
        }
        Ok(tx.commit().await?)
    }

    /// The key with this hash, unless it was revoked.
    pub async fn key(&self, sha256: &str) -> Result<ApiKey, DbError> {
        let query = sqlx::query("SELECT * FROM keys WHERE sha256 = $1 AND revoked_at IS NULL").bind(sha256);
        key(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    /// Every project's keys, oldest first, revoked ones too.
    pub async fn keys(&self) -> Result<Vec<ApiKey>, DbError> {
        let query = sqlx::query("SELECT * FROM keys ORDER BY created_at, id");
        query.fetch_all(&self.pool).await?.iter().map(key).collect()
    }

    /// From now on the key is refused. Revoking it again changes nothing.
    pub async fn revoke_key(&self, id: &str) -> Result<ApiKey, DbError> {
        let mut tx = self.begin().await?;
        let sql = self.sql("UPDATE keys SET revoked_at = {now} WHERE id = $1 AND revoked_at IS NULL RETURNING project");
        if let Some(row) = sqlx::query(sql).bind(id).fetch_optional(&mut *tx).await? {
            self.audit(&mut tx, OPERATOR, row.try_get("project")?, "key.revoke", id).await?;
        }
        let row = sqlx::query("SELECT * FROM keys WHERE id = $1").bind(id).fetch_optional(&mut *tx).await?;
        let key = key(&row.ok_or(DbError::NotFound)?)?;
        tx.commit().await?;
        Ok(key)
    }

    pub async fn has_keys(&self) -> Result<bool, DbError> {
        let row = sqlx::query("SELECT count(*) AS n FROM keys WHERE revoked_at IS NULL").fetch_one(&self.pool).await?;
        Ok(row.try_get::<i64, _>("n")? > 0)
    }
}
