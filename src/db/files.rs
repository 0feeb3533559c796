//! Uploaded files, and what was found in them.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError, Once, Page, Tx, to_json};
use crate::domain::{Caller, FileRecord, FileReport};

fn file(row: &AnyRow) -> Result<FileRecord, DbError> {
    Ok(FileRecord {
        id: row.try_get("id")?,
        project: row.try_get("project")?,
        filename: row.try_get("filename")?,
        purpose: row.try_get("purpose")?,
        bytes: row.try_get("bytes")?,
        sha256: row.try_get("sha256")?,
        status: row.try_get("status")?,
        status_details: row.try_get("status_details")?,
        created_at: row.try_get("created_at")?,
    })
}

pub(super) async fn insert(tx: &mut Tx, file: &FileRecord) -> Result<(), DbError> {
    let sql = "INSERT INTO files (id, project, filename, purpose, bytes, sha256, status, status_details, created_at) \
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)";
    let query = sqlx::query(sql).bind(&file.id).bind(&file.project).bind(&file.filename).bind(&file.purpose);
    let query = query.bind(file.bytes).bind(&file.sha256).bind(&file.status).bind(&file.status_details);
    query.bind(file.created_at).execute(&mut **tx).await?;
    Ok(())
}

impl Db {
    pub async fn insert_file(&self, actor: &str, file: &FileRecord, once: Option<&Once>) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        self.keep_answer(&mut tx, &file.project, once, file).await?;
        insert(&mut tx, file).await?;
        self.audit(&mut tx, actor, &file.project, "file.create", &file.id).await?;
        Ok(tx.commit().await?)
    }

    pub async fn file(&self, project: &str, id: &str) -> Result<FileRecord, DbError> {
        let query = sqlx::query("SELECT * FROM files WHERE project = $1 AND id = $2").bind(project).bind(id);
        file(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    /// Newest first unless `ascending`; after the file `after`.
    pub async fn files(
        &self,
        project: &str,
        purpose: Option<&str>,
        after: Option<&str>,
        ascending: bool,
        limit: usize,
    ) -> Result<Page<FileRecord>, DbError> {
        let (edge, order, start) = if ascending { (">", "ASC", 0) } else { ("<", "DESC", i64::MAX) };
        let edge_row = match after {
            Some(id) => self.place("files", project, id).await?,
            None => start,
        };
        let sql = format!(
            "SELECT * FROM files WHERE project = $1 AND ($2 = '' OR purpose = $2) AND {{seq}} {edge} $3 \
             ORDER BY {{seq}} {order} LIMIT $4"
        );
        let query = sqlx::query(self.sql(&sql)).bind(project).bind(purpose.unwrap_or(""));
        let query = query.bind(edge_row).bind(limit as i64 + 1);
        let rows = query.fetch_all(&self.pool).await?;
        Ok(Page::of(rows.iter().map(file).collect::<Result<_, _>>()?, limit))
    }

    /// Removes the row; the caller removes the bytes after it.
    pub async fn delete_file(&self, caller: &Caller, id: &str) -> Result<(), DbError> {
        let project = &caller.project;
        let mut tx = self.begin().await?;
        let query = sqlx::query("DELETE FROM files WHERE project = $1 AND id = $2").bind(project).bind(id);
        if query.execute(&mut *tx).await?.rows_affected() == 0 {
            return Err(DbError::NotFound);
        }
        sqlx::query("DELETE FROM reports WHERE file_id = $1").bind(id).execute(&mut *tx).await?;
        self.audit(&mut tx, &caller.key, project, "file.delete", id).await?;
        Ok(tx.commit().await?)
    }

    /// A report made before, for the same base and length.
    pub async fn report(&self, file: &str, model: &str, max_seq_len: u64) -> Result<Option<FileReport>, DbError> {
        let sql = "SELECT report FROM reports WHERE file_id = $1 AND model = $2 AND max_seq_len = $3";
        let query = sqlx::query(sql).bind(file).bind(model).bind(max_seq_len as i64);
        query.fetch_optional(&self.pool).await?.map(|row| super::json(&row, "report")).transpose()
    }

    pub async fn keep_report(&self, report: &FileReport) -> Result<(), DbError> {
        let sql = "INSERT INTO reports (file_id, model, max_seq_len, report) VALUES ($1, $2, $3, $4) \
                   ON CONFLICT (file_id, model, max_seq_len) DO UPDATE SET report = excluded.report";
        let query = sqlx::query(sql).bind(&report.file_id).bind(&report.model).bind(report.max_seq_len as i64);
        query.bind(to_json(report)?).execute(&self.pool).await?;
        Ok(())
    }
}
