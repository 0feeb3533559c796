//! Kept answers, and what people said of them.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, Once, Page, json, to_json};
use crate::domain::{Caller, Feedback, StoredCompletion};

/// What a feedback is about.
#[derive(Clone, Debug, Default)]
pub struct FeedbackFilter {
    /// Unix seconds of the feedback, both included.
    pub since: Option<i64>,
    pub until: Option<i64>,
    /// The model that answered.
    pub model: Option<String>,
}

fn completion(row: &AnyRow) -> Result<StoredCompletion, DbError> {
    Ok(StoredCompletion {
        id: row.try_get("id")?,
        project: row.try_get("project")?,
        model: row.try_get("model")?,
        fingerprint: row.try_get("fingerprint")?,
        created_at: row.try_get("created_at")?,
        messages: json(row, "messages")?,
        choices: json(row, "choices")?,
    })
}

fn feedback(row: &AnyRow) -> Result<Feedback, DbError> {
    let choice: i64 = row.try_get("choice")?;
    Ok(Feedback {
        id: row.try_get("id")?,
        project: row.try_get("project")?,
        completion_id: row.try_get("completion_id")?,
        choice: usize::try_from(choice).map_err(|_| DbError::Corrupt(format!("choice: {choice}")))?,
        judgement: json(row, "judgement")?,
        comment: row.try_get("comment")?,
        created_at: row.try_get("created_at")?,
    })
}

impl Db {
    /// Keeps an answer, and drops those that are older than `retention` seconds with what was said of them.
    pub async fn keep_completion(&self, kept: &StoredCompletion, retention: i64) -> Result<(), DbError> {
        self.forget_completions(retention).await?;
        let mut tx = self.begin().await?;
        let sql = "INSERT INTO completions (id, project, model, fingerprint, created_at, messages, choices) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7)";
        let query = sqlx::query(sql).bind(&kept.id).bind(&kept.project).bind(&kept.model).bind(&kept.fingerprint);
        let query = query.bind(kept.created_at).bind(to_json(&kept.messages)?).bind(to_json(&kept.choices)?);
        query.execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    /// Drops answers that are older than `retention` seconds, with what was said of them.
    pub async fn forget_completions(&self, retention: i64) -> Result<(), DbError> {
        let sql = self.sql("DELETE FROM completions WHERE created_at <= {now} - $1");
        sqlx::query(sql).bind(retention).execute(&self.pool).await?;
        Ok(())
    }

    pub async fn completion(&self, project: &str, id: &str) -> Result<StoredCompletion, DbError> {
        let query = sqlx::query("SELECT * FROM completions WHERE project = $1 AND id = $2").bind(project).bind(id);
        completion(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    /// With everything that was said of it.
    pub async fn delete_completion(&self, caller: &Caller, id: &str) -> Result<(), DbError> {
        self.delete_kept("completions", "completion.delete", caller, id).await
    }

    pub async fn insert_feedback(&self, caller: &Caller, said: &Feedback, once: Option<&Once>) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.keep_answer(&mut tx, &said.project, once, said).await?;
        let sql = "INSERT INTO feedback (id, project, completion_id, choice, judgement, comment, created_at) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7)";
        let query = sqlx::query(sql).bind(&said.id).bind(&said.project).bind(&said.completion_id);
        let query = query.bind(said.choice as i64).bind(to_json(&said.judgement)?).bind(&said.comment);
        query.bind(said.created_at).execute(&mut *tx).await?;
        self.audit(&mut tx, &caller.key, &said.project, "feedback.create", &said.id).await?;
        Ok(tx.commit().await?)
    }

    /// Newest first, after the feedback with id `after`.
    pub async fn feedback(&self, project: &str, after: Option<&str>, limit: usize) -> Result<Page<Feedback>, DbError> {
        let before = match after {
            Some(id) => self.place("feedback", project, id).await?,
            None => i64::MAX,
        };
        let sql = self.sql("SELECT * FROM feedback WHERE project = $1 AND {seq} < $2 ORDER BY {seq} DESC LIMIT $3");
        let query = sqlx::query(sql).bind(project).bind(before).bind(limit as i64 + 1);
        let rows = query.fetch_all(&self.pool).await?;
        Ok(Page::of(rows.iter().map(feedback).collect::<Result<_, _>>()?, limit))
    }

    pub async fn delete_feedback(&self, caller: &Caller, id: &str) -> Result<(), DbError> {
        self.delete_kept("feedback", "feedback.delete", caller, id).await
    }

    /// All that fits, oldest first, at most `limit`.
    pub async fn feedback_of(
        &self,
        project: &str,
        filter: &FeedbackFilter,
        limit: usize,
    ) -> Result<Vec<Feedback>, DbError> {
        let sql = self.sql(
            "SELECT f.* FROM feedback f JOIN completions c ON c.id = f.completion_id WHERE f.project = $1 \
             AND f.created_at >= $2 AND f.created_at <= $3 AND ($4 = '' OR c.model = $4) ORDER BY f.{seq} LIMIT $5",
        );
        let query = sqlx::query(sql).bind(project).bind(filter.since.unwrap_or(0));
        let query = query.bind(filter.until.unwrap_or(i64::MAX)).bind(filter.model.as_deref().unwrap_or(""));
        query.bind(limit as i64).fetch_all(&self.pool).await?.iter().map(feedback).collect()
    }

    async fn delete_kept(
        &self,
        table: &'static str,
        action: &'static str,
        caller: &Caller,
        id: &str,
    ) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        let sql = self.sql(&format!("DELETE FROM {table} WHERE project = $1 AND id = $2"));
        let query = sqlx::query(sql).bind(&caller.project).bind(id);
        if query.execute(&mut *tx).await?.rows_affected() == 0 {
            return Err(DbError::NotFound);
        }
        self.audit(&mut tx, &caller.key, &caller.project, action, id).await?;
        Ok(tx.commit().await?)
    }
}
