//! Tasks that label pairs: rows under a lease, as jobs are, and their labels one by one.

use std::fmt::Write as _;

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, Once, Page, Tx, files, json, optional_json, to_json};
use crate::domain::{Caller, Failure, FileRecord, JobStatus, LabelReport, Labelled, Labelling};

/// Attempts in a row without a label after which a task fails.
const MAX_BARREN: i64 = 3;

/// Rows with the number of their labels; conditions follow.
const SELECT: &str = "SELECT t.*, (SELECT count(*) FROM labels WHERE labels.task_id = t.id) AS done FROM labellings t";

fn labelling(row: &AnyRow) -> Result<Labelling, DbError> {
    let status: String = row.try_get("status")?;
    let (report, total): (Option<LabelReport>, i64) = (optional_json(row, "report")?, row.try_get("total")?);
    Ok(Labelling {
        id: row.try_get("id")?,
        project: row.try_get("project")?,
        created_at: row.try_get("created_at")?,
        started_at: row.try_get("started_at")?,
        finished_at: row.try_get("finished_at")?,
        status: JobStatus::parse(&status).ok_or_else(|| DbError::Corrupt(format!("status {status}")))?,
        spec: json(row, "spec")?,
        base: row.try_get("base")?,
        total,
        // The labels of a finished task are in its file.
        done: if report.is_some() { total } else { row.try_get("done")? },
        report,
        result_file: row.try_get("result_file")?,
        error: optional_json(row, "error")?,
        metadata: optional_json(row, "metadata")?,
        fence: row.try_get("fence")?,
        barren_attempts: row.try_get("barren_attempts")?,
    })
}

impl Db {
    pub async fn insert_labelling(&self, actor: &str, task: &Labelling, once: Option<&Once>) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.keep_answer(&mut tx, &task.project, once, task).await?;
        let sql = "INSERT INTO labellings (id, project, created_at, status, file, spec, base, total, metadata, fence, \
                   barren_attempts) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 0, 0)";
        let query = sqlx::query(sql).bind(&task.id).bind(&task.project).bind(task.created_at);
        let query = query.bind(task.status.as_str()).bind(&task.spec.file).bind(to_json(&task.spec)?);
        let query = query.bind(&task.base).bind(task.total);
        query.bind(task.metadata.as_ref().map(to_json).transpose()?).execute(&mut *tx).await?;
        self.audit(&mut tx, actor, &task.project, "preferences.create", &task.id).await?;
        Ok(tx.commit().await?)
    }

    pub async fn labelling(&self, project: &str, id: &str) -> Result<Labelling, DbError> {
        let sql = self.sql(&format!("{SELECT} WHERE t.project = $1 AND t.id = $2"));
        let query = sqlx::query(sql).bind(project).bind(id);
        labelling(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    /// Newest first, after the task `after`.
    pub async fn labellings(
        &self,
        project: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<Labelling>, DbError> {
        let before = match after {
            Some(id) => self.place("labellings", project, id).await?,
            None => i64::MAX,
        };
        let order = "WHERE t.project = $1 AND t.{seq} < $2 ORDER BY t.{seq} DESC LIMIT $3";
        let sql = self.sql(&format!("{SELECT} {order}"));
        let query = sqlx::query(sql).bind(project).bind(before).bind(limit as i64 + 1);
        let rows = query.fetch_all(&self.pool).await?;
        Ok(Page::of(rows.iter().map(labelling).collect::<Result<_, _>>()?, limit))
    }

    /// A queued task ends at once; a running one's worker acts within seconds.
    pub async fn cancel_labelling(&self, caller: &Caller, id: &str) -> Result<Labelling, DbError> {
        let mut tx = self.begin().await?;
        let sql = self.sql("SELECT status FROM labellings WHERE project = $1 AND id = $2 {lock}");
        let query = sqlx::query(sql).bind(&caller.project).bind(id);
        let status: String = query.fetch_optional(&mut *tx).await?.ok_or(DbError::NotFound)?.try_get("status")?;
        let set = match status.as_str() {
            "queued" => "status = 'cancelled', finished_at = {now}",
            "running" => "requested = 'cancel'",
            _ => return Err(DbError::Conflict(format!("a task that is {status} cannot cancel"))),
        };
        let sql = self.sql(&format!("UPDATE labellings SET {set} WHERE id = $1"));
        sqlx::query(sql).bind(id).execute(&mut *tx).await?;
        self.audit(&mut tx, &caller.key, &caller.project, "preferences.cancel", id).await?;
        tx.commit().await?;
        self.labelling(&caller.project, id).await
    }

    /// Takes the next task on one of these bases, or on none.
    pub async fn claim_labelling(
        &self,
        worker: &str,
        bases: &[&str],
        lease: i64,
    ) -> Result<Option<Labelling>, DbError> {
        let mut tx = self.begin().await?;
        let mut places = String::from("''");
        for n in 3..3 + bases.len() {
            // Writing to a string cannot fail.
            _ = write!(places, ", ${n}");
        }
        let sql = self.sql(&format!(
            "UPDATE labellings SET status = 'running', fence = fence + 1, worker = $1, lease_until = {{now}} + $2, \
             started_at = COALESCE(started_at, {{now}}), barren_attempts = barren_attempts + 1 WHERE id = \
             (SELECT id FROM labellings WHERE (status = 'queued' OR (status = 'running' AND lease_until < {{now}})) \
             AND base IN ({places}) ORDER BY {{seq}} LIMIT 1 {{skip}}) RETURNING id, project, barren_attempts"
        ));
        let query = sqlx::query(sql).bind(worker).bind(lease);
        let query = bases.iter().fold(query, |query, base| query.bind(*base));
        let Some(row) = query.fetch_optional(&mut *tx).await? else { return Ok(None) };
        let (id, project): (String, String) = (row.try_get("id")?, row.try_get("project")?);
        let barren: i64 = row.try_get("barren_attempts")?;
        if barren > MAX_BARREN {
            let message = format!("{MAX_BARREN} attempts ended without a label");
            let failure = Failure { code: "internal_poison".to_owned(), message, param: None };
            self.end_labelling(&mut tx, &id, "failed", Some(&failure)).await?;
            tx.commit().await?;
            return Ok(None);
        }
        tx.commit().await?;
        self.labelling(&project, &id).await.map(Some)
    }

    /// With an embedded database there are no other workers.
    pub(super) async fn release_local_labellings(&self) -> Result<(), DbError> {
        let sql = "UPDATE labellings SET status = 'queued', worker = NULL, lease_until = NULL WHERE status = 'running'";
        sqlx::query(sql).execute(&self.pool).await?;
        Ok(())
    }

    /// Keeps the lease; answers what the user asked for meanwhile.
    pub async fn heartbeat_labelling(&self, task: &Labelling, lease: i64) -> Result<Option<String>, DbError> {
        let sql = self.sql(
            "UPDATE labellings SET lease_until = {now} + $3 WHERE id = $1 AND fence = $2 AND status = 'running' \
             RETURNING requested",
        );
        let query = sqlx::query(sql).bind(&task.id).bind(task.fence).bind(lease);
        Ok(query.fetch_optional(&self.pool).await?.ok_or(DbError::Fenced)?.try_get("requested")?)
    }

    /// A row of the file is through.
    pub async fn record_label(&self, task: &Labelling, line: u64, label: &Labelled) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold_labelling(&mut tx, task).await?;
        let sql = "INSERT INTO labels (task_id, line, label) VALUES ($1, $2, $3)";
        let query = sqlx::query(sql).bind(&task.id).bind(line as i64).bind(to_json(label)?);
        query.execute(&mut *tx).await?;
        let sql = "UPDATE labellings SET barren_attempts = 0 WHERE id = $1";
        sqlx::query(sql).bind(&task.id).execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    /// In the order of the file, with their lines.
    pub async fn labels(&self, task: &str) -> Result<Vec<(u64, Labelled)>, DbError> {
        let sql = "SELECT line, label FROM labels WHERE task_id = $1 ORDER BY line";
        let rows = sqlx::query(sql).bind(task).fetch_all(&self.pool).await?;
        rows.iter().map(|row| Ok((row.try_get::<i64, _>("line")? as u64, json(row, "label")?))).collect()
    }

    /// The dataset becomes visible: file, report and status in one transaction. The labels are in the file.
    pub async fn finish_labelling(
        &self,
        task: &Labelling,
        file: &FileRecord,
        report: &LabelReport,
    ) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        let worker = self.hold_labelling(&mut tx, task).await?;
        files::insert(&mut tx, file).await?;
        let sql = "UPDATE labellings SET report = $2, result_file = $3 WHERE id = $1";
        let query = sqlx::query(sql).bind(&task.id).bind(to_json(report)?).bind(&file.id);
        query.execute(&mut *tx).await?;
        self.end_labelling(&mut tx, &task.id, "succeeded", None).await?;
        self.audit(&mut tx, &worker, &task.project, "preferences.succeed", &task.id).await?;
        Ok(tx.commit().await?)
    }

    pub async fn fail_labelling(&self, task: &Labelling, failure: &Failure) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold_labelling(&mut tx, task).await?;
        self.end_labelling(&mut tx, &task.id, "failed", Some(failure)).await?;
        Ok(tx.commit().await?)
    }

    pub async fn labelling_cancelled(&self, task: &Labelling) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold_labelling(&mut tx, task).await?;
        self.end_labelling(&mut tx, &task.id, "cancelled", None).await?;
        Ok(tx.commit().await?)
    }

    /// The worker goes away, or something outside failed that may work again in `pause` seconds: the attempt does not
    /// count.
    pub async fn release_labelling(&self, task: &Labelling, pause: i64) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.hold_labelling(&mut tx, task).await?;
        let sql = self.sql(
            "UPDATE labellings SET worker = NULL, lease_until = {now} + $2, barren_attempts = \
             CASE WHEN barren_attempts > 0 THEN barren_attempts - 1 ELSE 0 END WHERE id = $1",
        );
        sqlx::query(sql).bind(&task.id).bind(pause).execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    /// Locks the task's row for this attempt, or finds out that the attempt is over; answers the worker.
    async fn hold_labelling(&self, tx: &mut Tx, task: &Labelling) -> Result<String, DbError> {
        let sql = "UPDATE labellings SET fence = fence WHERE id = $1 AND fence = $2 AND status = 'running' \
                   RETURNING COALESCE(worker, '') AS worker";
        let row = sqlx::query(sql).bind(&task.id).bind(task.fence).fetch_optional(&mut **tx).await?;
        Ok(row.ok_or(DbError::Fenced)?.try_get("worker")?)
    }

    async fn end_labelling(
        &self,
        tx: &mut Tx,
        id: &str,
        status: &str,
        failure: Option<&Failure>,
    ) -> Result<(), DbError> {
        let sql = self.sql(
            "UPDATE labellings SET status = $2, error = $3, finished_at = {now}, requested = NULL, lease_until = NULL \
             WHERE id = $1",
        );
        let query = sqlx::query(sql).bind(id).bind(status).bind(failure.map(to_json).transpose()?);
        query.execute(&mut **tx).await?;
        sqlx::query("DELETE FROM labels WHERE task_id = $1").bind(id).execute(&mut **tx).await?;
        Ok(())
    }
}
