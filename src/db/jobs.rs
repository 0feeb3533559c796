//! Jobs as their users see and steer them.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, NewEvent, Once, Page, json, optional_json, to_json};
use crate::domain::{Caller, Job, JobStatus};

pub(super) fn job(row: &AnyRow) -> Result<Job, DbError> {
    let status: String = row.try_get("status")?;
    Ok(Job {
        id: row.try_get("id")?,
        project: row.try_get("project")?,
        created_at: row.try_get("created_at")?,
        started_at: row.try_get("started_at")?,
        finished_at: row.try_get("finished_at")?,
        status: JobStatus::parse(&status).ok_or_else(|| DbError::Corrupt(format!("status {status}")))?,
        requested: row.try_get("requested")?,
        model: row.try_get("model")?,
        training_file: row.try_get("training_file")?,
        validation_file: row.try_get("validation_file")?,
        spec: json(row, "spec")?,
        priority: row.try_get("priority")?,
        output_model: row.try_get("output_model")?,
        fine_tuned_model: row.try_get("fine_tuned_model")?,
        trained_tokens: row.try_get("trained_tokens")?,
        result_files: json(row, "result_files")?,
        error: optional_json(row, "error")?,
        metadata: optional_json(row, "metadata")?,
        fence: row.try_get("fence")?,
        barren_attempts: row.try_get("barren_attempts")?,
        estimated_finish: row.try_get("estimated_finish")?,
    })
}

/// What a user wants of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    Pause,
    Resume,
    Cancel,
}

impl Db {
    /// A new job and its first event, in one transaction.
    pub async fn insert_job(&self, actor: &str, job: &Job, once: Option<&Once>) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.keep_answer(&mut tx, &job.project, once, job).await?;
        let sql = "INSERT INTO jobs (id, project, created_at, status, model, training_file, validation_file, spec, \
                   priority, output_model, result_files, metadata, base, fence, barren_attempts, next_seq) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, '[]', $11, $12, 0, 0, 0)";
        let query = sqlx::query(sql).bind(&job.id).bind(&job.project).bind(job.created_at).bind(job.status.as_str());
        let query = query.bind(&job.model).bind(&job.training_file).bind(&job.validation_file);
        let query = query.bind(to_json(&job.spec)?).bind(job.priority).bind(&job.output_model);
        let query = query.bind(job.metadata.as_ref().map(to_json).transpose()?).bind(&job.spec.base);
        query.execute(&mut *tx).await?;
        self.append(&mut tx, &job.id, &NewEvent::info("The job was created and waits for a worker")).await?;
        self.audit(&mut tx, actor, &job.project, "job.create", &job.id).await?;
        Ok(tx.commit().await?)
    }

    pub async fn job(&self, project: &str, id: &str) -> Result<Job, DbError> {
        let query = sqlx::query("SELECT * FROM jobs WHERE project = $1 AND id = $2").bind(project).bind(id);
        job(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    /// Newest first, after the job `after`.
    pub async fn jobs(&self, project: &str, after: Option<&str>, limit: usize) -> Result<Page<Job>, DbError> {
        let before = match after {
            Some(id) => self.place("jobs", project, id).await?,
            None => i64::MAX,
        };
        let sql = self.sql("SELECT * FROM jobs WHERE project = $1 AND {seq} < $2 ORDER BY {seq} DESC LIMIT $3");
        let query = sqlx::query(sql).bind(project).bind(before).bind(limit as i64 + 1);
        let rows = query.fetch_all(&self.pool).await?;
        Ok(Page::of(rows.iter().map(job).collect::<Result<_, _>>()?, limit))
    }

    /// Whether a job, a batch or a task that has not ended reads this file.
    pub async fn file_is_in_use(&self, file: &str) -> Result<bool, DbError> {
        let sql = "SELECT (SELECT count(*) FROM jobs WHERE (training_file = $1 OR validation_file = $1) \
                   AND status IN ('queued', 'running', 'paused')) + (SELECT count(*) FROM batches \
                   WHERE input_file = $1 AND status IN ('validating', 'in_progress', 'cancelling')) \
                   + (SELECT count(*) FROM labellings WHERE file = $1 AND status IN ('queued', 'running')) AS n";
        Ok(sqlx::query(sql).bind(file).fetch_one(&self.pool).await?.try_get::<i64, _>("n")? > 0)
    }

    /// Queued jobs change at once; a running one's worker acts within a step.
    pub async fn steer(&self, caller: &Caller, id: &str, wish: Wish) -> Result<Job, DbError> {
        let mut tx = self.begin().await?;
        // Held, so that a worker that claims or ends the job comes before all of this or after it.
        let sql = self.sql("SELECT * FROM jobs WHERE project = $1 AND id = $2 {lock}");
        let query = sqlx::query(sql).bind(&caller.project).bind(id);
        let now = job(&query.fetch_optional(&mut *tx).await?.ok_or(DbError::NotFound)?)?;
        use JobStatus::{Paused, Queued, Running};
        let (set, event) = match (wish, now.status) {
            (Wish::Pause, Queued) => ("status = 'paused'", "The job was paused before it started"),
            (Wish::Pause, Running) if now.requested.as_deref() != Some("cancel") => {
                ("requested = 'pause'", "A pause was requested")
            }
            (Wish::Cancel, Queued | Paused) => ("status = 'cancelled', finished_at = {now}", "The job was cancelled"),
            (Wish::Cancel, Running) => ("requested = 'cancel'", "A cancellation was requested"),
            (Wish::Resume, Paused) => ("status = 'queued', requested = NULL", "The job was resumed"),
            (Wish::Resume, Running) if now.requested.as_deref() == Some("pause") => {
                ("requested = NULL", "The pause was taken back")
            }
            (_, status) => {
                let verb = format!("{wish:?}").to_lowercase();
                return Err(DbError::Conflict(format!("a job that is {} cannot {verb}", status.as_str())));
            }
        };
        let sql = self.sql(&format!("UPDATE jobs SET {set} WHERE id = $1 RETURNING *"));
        let changed = job(&sqlx::query(sql).bind(id).fetch_one(&mut *tx).await?)?;
        self.append(&mut tx, id, &NewEvent::info(event)).await?;
        self.audit(&mut tx, &caller.key, &caller.project, &format!("job.{wish:?}").to_lowercase(), id).await?;
        tx.commit().await?;
        Ok(changed)
    }
}
