//! Jobs as their workers see them: a lease on a row is the queue, and every write carries the attempt's fence.

use std::fmt::Write as _;

use sqlx::Row;

use super::{CheckpointRecord, Db, DbError, Tx, adapters, files, jobs::job, to_json};
use crate::domain::{AdapterRecord, Failure, FileRecord, Job, Metrics};

/// Attempts in a row without a step or a checkpoint after which a job fails.
const MAX_BARREN: i64 = 3;

/// Seconds before an attempt that ended by a passing fault is followed by another: doubled each time, up to this.
const MAX_PAUSE: i64 = 64;

/// An event before it has a number.
#[derive(Clone, Debug)]
pub struct NewEvent {
    pub level: String,
    pub message: String,
    pub data: Option<serde_json::Value>,
    /// For metrics: the optimiser step.
    pub step: Option<i64>,
}

impl NewEvent {
    pub fn info(message: impl Into<String>) -> Self {
        Self { level: "info".to_owned(), message: message.into(), data: None, step: None }
    }

    pub fn at_level(level: &str, message: impl Into<String>) -> Self {
        Self { level: level.to_owned(), ..Self::info(message) }
    }

    pub fn metrics(metrics: &Metrics) -> Self {
        let loss = metrics.train_loss.map_or(String::new(), |loss| format!(", training loss={loss:.4}"));
        Self {
            level: "info".to_owned(),
            message: format!("Step {}/{}{loss}", metrics.step, metrics.total_steps),
            data: serde_json::to_value(metrics).ok(),
            step: i64::try_from(metrics.step).ok(),
        }
    }
}

/// The right to work on a job, as long as nobody else claims it.
#[derive(Clone, Debug)]
pub struct Claim {
    pub job: Job,
}

/// What becomes visible when a job succeeds.
#[derive(Clone, Debug)]
pub struct Publication {
    pub adapter: AdapterRecord,
    pub result_file: FileRecord,
    pub trained_tokens: i64,
}

/// Takes this attempt from those that count as barren: `claim` counted it.
const UNCOUNTED: &str = "barren_attempts = CASE WHEN barren_attempts > 0 THEN barren_attempts - 1 ELSE 0 END";

/// What stands in the row of a job that this attempt owns.
struct Held {
    /// What the user asked for meanwhile.
    requested: Option<String>,
    faults: i64,
    worker: String,
}

impl Db {
    /// Takes the next job on one of these bases: queued ones, and those whose worker let its lease run out.
    pub async fn claim(&self, worker: &str, bases: &[&str], lease_seconds: i64) -> Result<Option<Claim>, DbError> {
        let mut tx = self.begin().await?;
        let mut places = String::from("NULL");
        for n in 3..3 + bases.len() {
            // Writing to a string cannot fail.
            _ = write!(places, ", ${n}");
        }
        let sql = self.sql(&format!(
            "UPDATE jobs SET status = 'running', fence = fence + 1, worker = $1, lease_until = {{now}} + $2, \
             started_at = COALESCE(started_at, {{now}}), barren_attempts = barren_attempts + 1 WHERE id = \
             (SELECT id FROM jobs WHERE (status = 'queued' OR (status = 'running' AND lease_until < {{now}})) \
             AND base IN ({places}) ORDER BY priority DESC, {{seq}} LIMIT 1 {{skip}}) RETURNING *"
        ));
        let query = sqlx::query(sql).bind(worker).bind(lease_seconds);
        let query = bases.iter().fold(query, |query, base| query.bind(*base));
        let Some(row) = query.fetch_optional(&mut *tx).await? else { return Ok(None) };
        let job = job(&row)?;
        let poisoned = job.barren_attempts > MAX_BARREN;
        if poisoned {
            let code = "internal_poison".to_owned();
            let message = format!("{MAX_BARREN} attempts ended without a step or a checkpoint");
            self.set_failed(&mut tx, &job.id, &Failure { code, message, param: None }).await?;
        } else {
            self.append(&mut tx, &job.id, &NewEvent::info(format!("Attempt {} started", job.fence))).await?;
        }
        tx.commit().await?;
        Ok((!poisoned).then_some(Claim { job }))
    }

    /// With an embedded database there are no other workers: whatever ran when the process ended is free again.
    pub async fn release_local_claims(&self) -> Result<u64, DbError> {
        self.release_local_batches().await?;
        self.release_local_labellings().await?;
        let sql = "UPDATE jobs SET status = 'queued', worker = NULL, lease_until = NULL WHERE status = 'running'";
        Ok(sqlx::query(sql).execute(&self.pool).await?.rows_affected())
    }

    /// Keeps the lease; answers what the user asked for meanwhile.
    pub async fn heartbeat(&self, job: &Job, lease_seconds: i64) -> Result<Option<String>, DbError> {
        let sql = self.sql(
            "UPDATE jobs SET lease_until = {now} + $3 WHERE id = $1 AND fence = $2 AND status = 'running' \
             RETURNING requested",
        );
        let query = sqlx::query(sql).bind(&job.id).bind(job.fence).bind(lease_seconds);
        Ok(query.fetch_optional(&self.pool).await?.ok_or(DbError::Fenced)?.try_get("requested")?)
    }

    /// Appends events; answers what the user asked for meanwhile. A step's metrics are progress.
    pub async fn record(
        &self,
        job: &Job,
        events: &[NewEvent],
        estimated_finish: Option<i64>,
    ) -> Result<Option<String>, DbError> {
        let mut tx = self.begin().await?;
        let requested = self.hold(&mut tx, job).await?.requested;
        for event in events {
            self.append(&mut tx, &job.id, event).await?;
        }
        let progressed = events.iter().any(|event| event.step.is_some());
        let sql = "UPDATE jobs SET estimated_finish = COALESCE($2, estimated_finish), \
                   barren_attempts = CASE WHEN $3 = 1 THEN 0 ELSE barren_attempts END, \
                   faults = CASE WHEN $3 = 1 THEN 0 ELSE faults END WHERE id = $1";
        let query = sqlx::query(sql).bind(&job.id).bind(estimated_finish).bind(i64::from(progressed));
        query.execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(requested)
    }

    /// Makes a checkpoint known, and servable when it has an adapter. One of the same step is replaced.
    pub async fn record_checkpoint(
        &self,
        job: &Job,
        checkpoint: &CheckpointRecord,
        adapter: Option<&AdapterRecord>,
    ) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold(&mut tx, job).await?;
        let sql = "INSERT INTO checkpoints (id, job_id, created_at, fence, step, model, files, metrics) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (job_id, step) DO UPDATE SET \
                   fence = excluded.fence, files = excluded.files, metrics = excluded.metrics";
        let c = checkpoint;
        let query = sqlx::query(sql).bind(&c.id).bind(&c.job_id).bind(c.created_at).bind(c.fence).bind(c.step);
        query.bind(&c.model).bind(to_json(&c.files)?).bind(to_json(&c.metrics)?).execute(&mut *tx).await?;
        if let Some(adapter) = adapter {
            adapters::insert(&mut tx, adapter).await?;
        }
        let sql = "UPDATE jobs SET barren_attempts = 0, faults = 0 WHERE id = $1";
        sqlx::query(sql).bind(&job.id).execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    /// The result becomes visible: adapter, name, result file and status in one transaction.
    pub async fn succeed(&self, job: &Job, publication: &Publication) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        let held = self.hold(&mut tx, job).await?;
        let file = &publication.result_file;
        files::insert(&mut tx, file).await?;
        adapters::insert(&mut tx, &publication.adapter).await?;
        let message = format!("The job succeeded: {}", publication.adapter.model);
        self.append(&mut tx, &job.id, &NewEvent::info(message)).await?;
        let sql = self.sql(
            "UPDATE jobs SET status = 'succeeded', finished_at = {now}, fine_tuned_model = output_model, \
             trained_tokens = $2, result_files = $3, requested = NULL, lease_until = NULL, barren_attempts = 0 \
             WHERE id = $1",
        );
        let query = sqlx::query(sql).bind(&job.id).bind(publication.trained_tokens);
        query.bind(to_json(&vec![&file.id])?).execute(&mut *tx).await?;
        self.audit(&mut tx, &held.worker, &job.project, "job.succeed", &job.id).await?;
        Ok(tx.commit().await?)
    }

    pub async fn fail(&self, job: &Job, failure: &Failure) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold(&mut tx, job).await?;
        self.set_failed(&mut tx, &job.id, failure).await?;
        Ok(tx.commit().await?)
    }

    pub async fn cancelled(&self, job: &Job) -> Result<(), DbError> {
        let set = "status = 'cancelled', finished_at = {now}, requested = NULL, lease_until = NULL";
        self.leave(job, set, "The job was cancelled").await
    }

    /// A cancellation that came while the checkpoint was written wins.
    pub async fn paused(&self, job: &Job) -> Result<(), DbError> {
        if self.heartbeat(job, 90).await?.as_deref() == Some("cancel") {
            return self.cancelled(job).await;
        }
        let set = "status = 'paused', requested = NULL, lease_until = NULL, barren_attempts = 0";
        self.leave(job, set, "The job is paused").await
    }

    /// The worker goes away: the job waits for another, and this attempt does not count.
    pub async fn released(&self, job: &Job) -> Result<(), DbError> {
        let set = format!("status = 'queued', worker = NULL, lease_until = NULL, {UNCOUNTED}");
        self.leave(job, &set, "The worker stopped; the job goes on from its last checkpoint").await
    }

    /// Something outside the job failed that may work again. The job stays with no worker for a moment, longer after
    /// each fault in a row, and this attempt does not count. Answers the seconds.
    pub async fn give_back(&self, job: &Job) -> Result<i64, DbError> {
        let mut tx = self.begin().await?;
        let faults = self.hold(&mut tx, job).await?.faults;
        let pause = (1 << faults.clamp(0, 30)).min(MAX_PAUSE);
        let event = format!("A passing fault of the server ended the attempt; the next begins in {pause} s");
        self.append(&mut tx, &job.id, &NewEvent::at_level("warn", event)).await?;
        let set = "worker = NULL, lease_until = {now} + $2, faults = faults + 1";
        let sql = self.sql(&format!("UPDATE jobs SET {set}, {UNCOUNTED} WHERE id = $1"));
        sqlx::query(sql).bind(&job.id).bind(pause).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(pause)
    }

    async fn leave(&self, job: &Job, set: &str, event: &str) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold(&mut tx, job).await?;
        self.append(&mut tx, &job.id, &NewEvent::info(event)).await?;
        let sql = self.sql(&format!("UPDATE jobs SET {set} WHERE id = $1"));
        sqlx::query(sql).bind(&job.id).execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    /// Locks the job's row for this attempt, or finds out that the attempt is over.
    async fn hold(&self, tx: &mut Tx, job: &Job) -> Result<Held, DbError> {
        let sql = "UPDATE jobs SET fence = fence WHERE id = $1 AND fence = $2 AND status = 'running' \
                   RETURNING requested, faults, COALESCE(worker, '') AS worker";
        let row = sqlx::query(sql).bind(&job.id).bind(job.fence).fetch_optional(&mut **tx).await?;
        let row = row.ok_or(DbError::Fenced)?;
        Ok(Held {
            requested: row.try_get("requested")?,
            faults: row.try_get("faults")?,
            worker: row.try_get("worker")?,
        })
    }

    async fn set_failed(&self, tx: &mut Tx, job: &str, failure: &Failure) -> Result<(), DbError> {
        let message = format!("The job failed: {}", failure.message);
        self.append(tx, job, &NewEvent::at_level("error", message)).await?;
        let sql = self.sql(
            "UPDATE jobs SET status = 'failed', finished_at = {now}, error = $2, requested = NULL, \
             lease_until = NULL WHERE id = $1",
        );
        sqlx::query(sql).bind(job).bind(to_json(failure)?).execute(&mut **tx).await?;
        Ok(())
    }
}
