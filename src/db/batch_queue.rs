//! Batches as their runners see them: a lease on a row is the queue, and every write carries the attempt's fence.

use std::collections::HashSet;

use sqlx::Row;

use super::{Db, DbError, Tx, batches::batch, to_json};
use crate::domain::{BatchError, BatchLine, BatchRecord, BatchStatus, FileRecord};

/// Attempts in a row that end without a finished line, after which a batch fails.
const MAX_BARREN: i64 = 3;

/// Statuses in which a runner has something to do.
const OPEN: &str = "('validating', 'in_progress', 'finalizing', 'cancelling')";

/// How a batch stands by the database's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub status: BatchStatus,
    /// Its window has run out.
    pub is_late: bool,
}

impl Db {
    /// The oldest batch that nobody holds.
    pub async fn claim_batch(&self, lease_seconds: i64) -> Result<Option<BatchRecord>, DbError> {
        let mut tx = self.begin().await?;
        let sql = self.sql(&format!(
            "UPDATE batches SET fence = fence + 1, lease_until = {{now}} + $1, barren_attempts = barren_attempts + 1 \
             WHERE id = (SELECT id FROM batches WHERE status IN {OPEN} \
             AND (lease_until IS NULL OR lease_until < {{now}}) ORDER BY {{seq}} LIMIT 1 {{skip}}) RETURNING *"
        ));
        let Some(row) = sqlx::query(sql).bind(lease_seconds).fetch_optional(&mut *tx).await? else { return Ok(None) };
        let claimed = batch(&row)?;
        let is_poisoned = row.try_get::<i64, _>("barren_attempts")? > MAX_BARREN;
        if is_poisoned {
            let message = format!("{MAX_BARREN} attempts ended without an answer");
            let error = BatchError { code: "internal_poison".to_owned(), message, param: None, line: None };
            self.set_batch_failed(&mut tx, &claimed, &[error]).await?;
        }
        tx.commit().await?;
        Ok((!is_poisoned).then_some(claimed))
    }

    /// With an embedded database there are no other runners.
    pub(super) async fn release_local_batches(&self) -> Result<(), DbError> {
        sqlx::query("UPDATE batches SET lease_until = NULL").execute(&self.pool).await?;
        Ok(())
    }

    /// Keeps the lease.
    pub async fn beat_batch(&self, held: &BatchRecord, lease_seconds: i64) -> Result<Standing, DbError> {
        let sql = self.sql(&format!(
            "UPDATE batches SET lease_until = {{now}} + $3 WHERE id = $1 AND fence = $2 AND status IN {OPEN} \
             RETURNING status, CAST(CASE WHEN expires_at <= {{now}} THEN 1 ELSE 0 END AS BIGINT) AS late"
        ));
        let query = sqlx::query(sql).bind(&held.id).bind(held.fence).bind(lease_seconds);
        let row = query.fetch_optional(&self.pool).await?.ok_or(DbError::Fenced)?;
        let status: String = row.try_get("status")?;
        let status = BatchStatus::parse(&status).ok_or_else(|| DbError::Corrupt(format!("status {status}")))?;
        Ok(Standing { status, is_late: row.try_get::<i64, _>("late")? != 0 })
    }

    /// The file is right and has so many requests. One that was cancelled meanwhile stays so.
    pub async fn start_batch(&self, held: &BatchRecord, total: i64, model: Option<&str>) -> Result<(), DbError> {
        let sql = self.sql(
            "UPDATE batches SET total = $3, model = $4, \
             in_progress_at = CASE WHEN status = 'validating' THEN {now} ELSE in_progress_at END, \
             status = CASE WHEN status = 'validating' THEN 'in_progress' ELSE status END \
             WHERE id = $1 AND fence = $2",
        );
        let query = sqlx::query(sql).bind(&held.id).bind(held.fence).bind(total).bind(model);
        one(query.execute(&self.pool).await?.rows_affected())
    }

    pub async fn fail_batch(&self, held: &BatchRecord, errors: &[BatchError]) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold_batch(&mut tx, held).await?;
        self.set_batch_failed(&mut tx, held, errors).await?;
        Ok(tx.commit().await?)
    }

    async fn set_batch_failed(&self, tx: &mut Tx, held: &BatchRecord, errors: &[BatchError]) -> Result<(), DbError> {
        let sql = self.sql(
            "UPDATE batches SET status = 'failed', failed_at = {now}, errors = $2, lease_until = NULL WHERE id = $1",
        );
        sqlx::query(sql).bind(&held.id).bind(to_json(&errors)?).execute(&mut **tx).await?;
        sqlx::query("DELETE FROM batch_lines WHERE batch_id = $1").bind(&held.id).execute(&mut **tx).await?;
        Ok(())
    }

    /// What became of some lines, and the counts with it. A line is counted once.
    pub async fn record_lines(&self, held: &BatchRecord, lines: &[BatchLine]) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold_batch(&mut tx, held).await?;
        let (mut completed, mut failed, mut input, mut output) = (0i64, 0i64, 0i64, 0i64);
        for line in lines {
            let sql = "INSERT INTO batch_lines (batch_id, line, is_ok, output) VALUES ($1, $2, $3, $4) \
                       ON CONFLICT (batch_id, line) DO NOTHING";
            let query = sqlx::query(sql).bind(&held.id).bind(line.line).bind(i64::from(line.is_ok)).bind(&line.output);
            if query.execute(&mut *tx).await?.rows_affected() == 1 {
                completed += i64::from(line.is_ok);
                failed += i64::from(!line.is_ok);
                input += line.input_tokens;
                output += line.output_tokens;
            }
        }
        let sql = "UPDATE batches SET completed = completed + $2, failed = failed + $3, \
                   input_tokens = input_tokens + $4, output_tokens = output_tokens + $5, barren_attempts = 0 \
                   WHERE id = $1";
        let query = sqlx::query(sql).bind(&held.id).bind(completed).bind(failed).bind(input).bind(output);
        query.execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    /// Lines that need not be asked again.
    pub async fn finished_lines(&self, held: &BatchRecord) -> Result<HashSet<i64>, DbError> {
        let query = sqlx::query("SELECT line FROM batch_lines WHERE batch_id = $1").bind(&held.id);
        query.fetch_all(&self.pool).await?.iter().map(|row| Ok(row.try_get("line")?)).collect()
    }

    /// Results in the order of their lines, behind the line `after`: the number and the text.
    pub async fn batch_results(
        &self,
        batch: &str,
        is_ok: bool,
        after: i64,
        limit: i64,
    ) -> Result<Vec<(i64, String)>, DbError> {
        let sql = "SELECT line, output FROM batch_lines WHERE batch_id = $1 AND is_ok = $2 AND line > $3 \
                   ORDER BY line LIMIT $4";
        let query = sqlx::query(sql).bind(batch).bind(i64::from(is_ok)).bind(after).bind(limit);
        let rows = query.fetch_all(&self.pool).await?;
        rows.iter().map(|row| Ok((row.try_get("line")?, row.try_get("output")?))).collect()
    }

    /// Everything is answered; what is left is to write the files. A cancellation that came first wins.
    pub async fn finalize_batch(&self, held: &BatchRecord) -> Result<(), DbError> {
        let sql = self.sql(
            "UPDATE batches SET finalizing_at = CASE WHEN status = 'in_progress' THEN {now} ELSE finalizing_at END, \
             status = CASE WHEN status = 'in_progress' THEN 'finalizing' ELSE status END WHERE id = $1 AND fence = $2",
        );
        one(sqlx::query(sql).bind(&held.id).bind(held.fence).execute(&self.pool).await?.rows_affected())
    }

    /// The files and the end become visible at once: `completed`, `expired` or `cancelled`.
    pub async fn end_batch(
        &self,
        held: &BatchRecord,
        end: BatchStatus,
        output: Option<&FileRecord>,
        errors: Option<&FileRecord>,
    ) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold_batch(&mut tx, held).await?;
        for file in output.into_iter().chain(errors) {
            let sql = "INSERT INTO files (id, project, filename, purpose, bytes, sha256, status, created_at) \
                       VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
            let query = sqlx::query(sql).bind(&file.id).bind(&file.project).bind(&file.filename).bind(&file.purpose);
            let query = query.bind(file.bytes).bind(&file.sha256).bind(&file.status).bind(file.created_at);
            query.execute(&mut *tx).await?;
        }
        let at = match end {
            BatchStatus::Expired => "expired_at",
            BatchStatus::Cancelled => "cancelled_at",
            _ => "completed_at",
        };
        let sql = self.sql(&format!(
            "UPDATE batches SET status = $2, {at} = {{now}}, output_file = $3, error_file = $4, lease_until = NULL \
             WHERE id = $1"
        ));
        let query = sqlx::query(sql).bind(&held.id).bind(end.as_str());
        query.bind(output.map(|file| &file.id)).bind(errors.map(|file| &file.id)).execute(&mut *tx).await?;
        sqlx::query("DELETE FROM batch_lines WHERE batch_id = $1").bind(&held.id).execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    /// The process goes away: another takes the batch at once, and this attempt does not count.
    pub async fn release_batch(&self, held: &BatchRecord) -> Result<(), DbError> {
        let sql = "UPDATE batches SET lease_until = NULL, \
                   barren_attempts = CASE WHEN barren_attempts > 0 THEN barren_attempts - 1 ELSE 0 END \
                   WHERE id = $1 AND fence = $2";
        one(sqlx::query(sql).bind(&held.id).bind(held.fence).execute(&self.pool).await?.rows_affected())
    }

    /// Locks the batch's row for this attempt, or finds out that the attempt is over.
    async fn hold_batch(&self, tx: &mut Tx, held: &BatchRecord) -> Result<(), DbError> {
        let sql = format!("UPDATE batches SET fence = fence WHERE id = $1 AND fence = $2 AND status IN {OPEN}");
        let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(&held.id).bind(held.fence);
        one(query.execute(&mut **tx).await?.rows_affected())
    }
}

fn one(rows: u64) -> Result<(), DbError> {
    if rows == 1 { Ok(()) } else { Err(DbError::Fenced) }
}
