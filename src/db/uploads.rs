//! Uploads in parts. A status changes once, from pending; whoever changes it owns what follows.

use sqlx::{Row, any::AnyRow};

use super::{Db, DbError};
use crate::domain::{
    Caller,
    upload::{PartRecord, UploadRecord, UploadStatus},
};

fn name(status: UploadStatus) -> &'static str {
    match status {
        UploadStatus::Pending => "pending",
        UploadStatus::Completed => "completed",
        UploadStatus::Cancelled => "cancelled",
        UploadStatus::Expired => "expired",
    }
}

fn upload(row: &AnyRow) -> Result<UploadRecord, DbError> {
    let status: String = row.try_get("status")?;
    let all = [UploadStatus::Pending, UploadStatus::Completed, UploadStatus::Cancelled, UploadStatus::Expired];
    let status = all.into_iter().find(|known| name(*known) == status);
    Ok(UploadRecord {
        id: row.try_get("id")?,
        project: row.try_get("project")?,
        filename: row.try_get("filename")?,
        purpose: row.try_get("purpose")?,
        bytes: row.try_get("bytes")?,
        status: status.ok_or_else(|| DbError::Corrupt("an upload's status".to_owned()))?,
        created_at: row.try_get("created_at")?,
        expires_at: row.try_get("expires_at")?,
        file_id: row.try_get("file_id")?,
    })
}

fn part(row: &AnyRow) -> Result<PartRecord, DbError> {
    Ok(PartRecord {
        id: row.try_get("id")?,
        upload_id: row.try_get("upload_id")?,
        bytes: row.try_get("bytes")?,
        created_at: row.try_get("created_at")?,
    })
}

impl Db {
    pub async fn insert_upload(&self, caller: &Caller, new: &UploadRecord) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        let sql = "INSERT INTO uploads (id, project, filename, purpose, bytes, status, created_at, expires_at) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
        let query = sqlx::query(sql).bind(&new.id).bind(&new.project).bind(&new.filename).bind(&new.purpose);
        let query = query.bind(new.bytes).bind(name(new.status)).bind(new.created_at).bind(new.expires_at);
        query.execute(&mut *tx).await?;
        self.audit(&mut tx, &caller.key, &new.project, "upload.create", &new.id).await?;
        Ok(tx.commit().await?)
    }

    /// As it is by the database's clock: a pending upload whose time ran out is expired.
    pub async fn upload(&self, project: &str, id: &str) -> Result<UploadRecord, DbError> {
        let sql = self.sql(
            "SELECT id, project, filename, purpose, bytes, created_at, expires_at, file_id, \
             CASE WHEN status = 'pending' AND expires_at <= {now} THEN 'expired' ELSE status END AS status \
             FROM uploads WHERE project = $1 AND id = $2",
        );
        let query = sqlx::query(sql).bind(project).bind(id);
        upload(&query.fetch_optional(&self.pool).await?.ok_or(DbError::NotFound)?)
    }

    /// A part whose bytes are in the store. Fails when the upload is no longer pending, or all parts together would
    /// have more bytes than it said.
    pub async fn insert_part(&self, new: &PartRecord) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        let sql =
            self.sql("SELECT bytes FROM uploads WHERE id = $1 AND status = 'pending' AND expires_at > {now} {lock}");
        let Some(row) = sqlx::query(sql).bind(&new.upload_id).fetch_optional(&mut *tx).await? else {
            return Err(DbError::Conflict(format!("{} is no longer pending", new.upload_id)));
        };
        let wanted: i64 = row.try_get("bytes")?;
        let sql = "SELECT CAST(coalesce(sum(bytes), 0) AS BIGINT) AS held FROM upload_parts WHERE upload_id = $1";
        let held: i64 = sqlx::query(sql).bind(&new.upload_id).fetch_one(&mut *tx).await?.try_get("held")?;
        if held + new.bytes > wanted {
            let more = held + new.bytes;
            return Err(DbError::Conflict(format!("the parts have {more} bytes, above the upload's {wanted}")));
        }
        let sql = "INSERT INTO upload_parts (id, upload_id, bytes, created_at) VALUES ($1, $2, $3, $4)";
        let query = sqlx::query(sql).bind(&new.id).bind(&new.upload_id).bind(new.bytes).bind(new.created_at);
        query.execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    pub async fn parts(&self, upload: &str) -> Result<Vec<PartRecord>, DbError> {
        let query = sqlx::query("SELECT * FROM upload_parts WHERE upload_id = $1 ORDER BY created_at, id").bind(upload);
        query.fetch_all(&self.pool).await?.iter().map(part).collect()
    }

    /// Ends a pending upload; false when it has ended already.
    pub async fn end_upload(
        &self,
        caller: &Caller,
        id: &str,
        status: UploadStatus,
        file: Option<&str>,
    ) -> Result<bool, DbError> {
        let mut tx = self.begin().await?;
        let sql = self.sql(
            "UPDATE uploads SET status = $3, file_id = $4 \
             WHERE project = $1 AND id = $2 AND status = 'pending' AND expires_at > {now}",
        );
        let query = sqlx::query(sql).bind(&caller.project).bind(id).bind(name(status)).bind(file);
        if query.execute(&mut *tx).await?.rows_affected() == 0 {
            return Ok(false);
        }
        let action = format!("upload.{}", name(status));
        self.audit(&mut tx, &caller.key, &caller.project, &action, id).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Parts of uploads whose time ran out: the caller removes their bytes. Each is given once.
    pub async fn expire_uploads(&self) -> Result<Vec<PartRecord>, DbError> {
        let mut tx = self.begin().await?;
        let sql = self.sql("SELECT id FROM uploads WHERE status = 'pending' AND expires_at <= {now} {skip}");
        let ids = sqlx::query(sql).fetch_all(&mut *tx).await?;
        let mut parts = Vec::new();
        for row in ids {
            let id: String = row.try_get("id")?;
            let found = sqlx::query("SELECT * FROM upload_parts WHERE upload_id = $1").bind(&id);
            parts.extend(found.fetch_all(&mut *tx).await?.iter().map(part).collect::<Result<Vec<_>, _>>()?);
            sqlx::query("UPDATE uploads SET status = 'expired' WHERE id = $1").bind(&id).execute(&mut *tx).await?;
            sqlx::query("DELETE FROM upload_parts WHERE upload_id = $1").bind(&id).execute(&mut *tx).await?;
        }
        tx.commit().await?;
        Ok(parts)
    }
}
