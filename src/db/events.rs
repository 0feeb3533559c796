//! A job's log.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, NewEvent, Page, Tx, optional_json, to_json};
use crate::domain::{Event, EventKind, id};

fn event(row: &AnyRow) -> Result<Event, DbError> {
    let kind: String = row.try_get("kind")?;
    Ok(Event {
        id: row.try_get("id")?,
        job_id: row.try_get("job_id")?,
        seq: row.try_get("seq")?,
        created_at: row.try_get("created_at")?,
        level: row.try_get("level")?,
        message: row.try_get("message")?,
        kind: if kind == "metrics" { EventKind::Metrics } else { EventKind::Message },
        data: optional_json(row, "data")?,
    })
}

impl Db {
    /// Appends an event in a transaction that holds the job's row. A step's metrics are kept once: a resumed run
    /// repeats them with the same values.
    pub(super) async fn append(&self, tx: &mut Tx, job: &str, event: &NewEvent) -> Result<(), DbError> {
        if let Some(step) = event.step {
            let sql = "SELECT count(*) AS n FROM events WHERE job_id = $1 AND kind = 'metrics' AND step = $2";
            let row = sqlx::query(sql).bind(job).bind(step).fetch_one(&mut **tx).await?;
            if row.try_get::<i64, _>("n")? > 0 {
                return Ok(());
            }
        }
        let sql = "UPDATE jobs SET next_seq = next_seq + 1 WHERE id = $1 RETURNING next_seq";
        let seq: i64 = sqlx::query(sql).bind(job).fetch_one(&mut **tx).await?.try_get("next_seq")?;
        let sql = self.sql(
            "INSERT INTO events (id, job_id, seq, created_at, level, message, kind, data, step) \
             VALUES ($1, $2, $3, {now}, $4, $5, $6, $7, $8)",
        );
        let kind = if event.step.is_some() { "metrics" } else { "message" };
        let query = sqlx::query(sql).bind(id::new("ftevent-")).bind(job).bind(seq).bind(&event.level);
        let data = event.data.as_ref().map(to_json).transpose()?;
        query.bind(&event.message).bind(kind).bind(data).bind(event.step).execute(&mut **tx).await?;
        Ok(())
    }

    /// Newest first, after the event with id `after`.
    pub async fn events(
        &self,
        project: &str,
        job: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<Event>, DbError> {
        self.job(project, job).await?;
        let before = match after {
            Some(id) => {
                let query = sqlx::query("SELECT seq FROM events WHERE job_id = $1 AND id = $2").bind(job).bind(id);
                query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?.try_get("seq")?
            }
            None => i64::MAX,
        };
        let sql = "SELECT * FROM events WHERE job_id = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3";
        let query = sqlx::query(sql).bind(job).bind(before).bind(limit as i64 + 1);
        let rows = query.fetch_all(&self.pool).await?;
        Ok(Page::of(rows.iter().map(event).collect::<Result<_, _>>()?, limit))
    }

    /// Oldest first, those behind `seq`. The caller has checked whose job it is.
    pub async fn events_since(&self, job: &str, seq: i64, limit: usize) -> Result<Vec<Event>, DbError> {
        let sql = "SELECT * FROM events WHERE job_id = $1 AND seq > $2 ORDER BY seq LIMIT $3";
        let query = sqlx::query(sql).bind(job).bind(seq).bind(limit as i64);
        query.fetch_all(&self.pool).await?.iter().map(event).collect()
    }
}
