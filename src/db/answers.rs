//! What was made under an `Idempotency-Key`. The answer is written in the transaction that makes the thing, so that of
//! two equal requests, at once or one after the other, only one makes it.

use sqlx::Row;

use super::{Db, DbError, Tx, to_json};

/// Seconds that an answer is kept for.
const KEPT: i64 = 24 * 3600;

/// A request that makes its thing once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Once {
    /// As the client sent it.
    pub key: String,
    /// What tells the request from others: a hash of its route and content.
    pub request: String,
}

impl Db {
    /// The request and the answer, as JSON, that a key was used for.
    pub async fn answer(&self, project: &str, key: &str) -> Result<Option<(String, String)>, DbError> {
        let sql =
            self.sql("SELECT request, answer FROM answers WHERE project = $1 AND key = $2 AND created_at > {now} - $3");
        let query = sqlx::query(sql).bind(project).bind(key).bind(KEPT);
        let Some(row) = query.fetch_optional(&self.pool).await? else { return Ok(None) };
        Ok(Some((row.try_get("request")?, row.try_get("answer")?)))
    }

    pub(super) async fn keep_answer(
        &self,
        tx: &mut Tx,
        project: &str,
        once: Option<&Once>,
        answer: &impl serde::Serialize,
    ) -> Result<(), DbError> {
        let Some(once) = once else { return Ok(()) };
        let sql = self.sql("DELETE FROM answers WHERE created_at <= {now} - $1");
        sqlx::query(sql).bind(KEPT).execute(&mut **tx).await?;
        // PostgreSQL waits here for another transaction with the same key.
        let sql = self.sql(
            "INSERT INTO answers (project, key, request, answer, created_at) VALUES ($1, $2, $3, $4, {now}) \
             ON CONFLICT (project, key) DO NOTHING",
        );
        let query = sqlx::query(sql).bind(project).bind(&once.key).bind(&once.request).bind(to_json(answer)?);
        match query.execute(&mut **tx).await?.rows_affected() {
            0 => Err(DbError::Answered),
            _ => Ok(()),
        }
    }
}
