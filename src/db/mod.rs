//! All SQL. One query set for SQLite and PostgreSQL; every query of a user's data carries the project.

mod adapters;
mod checkpoints;
mod events;
mod files;
mod jobs;
mod keys;
mod queue;

use std::time::Duration;

use sqlx::{
    AnyPool, AssertSqlSafe, Executor, Row, SqlSafeStr,
    any::{AnyPoolOptions, AnyRow},
    migrate::{Migration, MigrationType, Migrator},
};

pub use checkpoints::CheckpointRecord;
pub use jobs::Wish;
pub use queue::{Claim, NewEvent, Publication};

#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("not found")]
    NotFound,
    /// The job is in a state that does not allow this.
    #[error("{0}")]
    Conflict(String),
    /// Another attempt owns the job now; what this one made is thrown away.
    #[error("this attempt no longer owns the job")]
    Fenced,
    #[error("the database has a row that cannot be read: {0}")]
    Corrupt(String),
    #[error("database: {0}")]
    Sql(#[from] sqlx::Error),
    #[error("database migration: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

/// One page of a list.
#[derive(Clone, Debug)]
pub struct Page<T> {
    pub data: Vec<T>,
    pub has_more: bool,
}

impl<T> Page<T> {
    /// Of `limit + 1` rows.
    fn of(mut data: Vec<T>, limit: usize) -> Self {
        let has_more = data.len() > limit;
        data.truncate(limit);
        Self { data, has_more }
    }
}

/// A pool of connections. Cheap to clone.
#[derive(Clone)]
pub struct Db {
    pool: AnyPool,
    is_sqlite: bool,
}

impl Db {
    /// `sqlite:PATH` (made if missing) or `postgres://…`.
    pub async fn connect(url: &str) -> Result<Self, DbError> {
        sqlx::any::install_default_drivers();
        let is_sqlite = url.starts_with("sqlite:");
        // One connection serialises SQLite's writers, so that none is ever refused as busy.
        let options = AnyPoolOptions::new().max_connections(if is_sqlite { 1 } else { 16 });
        let options = options.acquire_timeout(Duration::from_secs(30)).after_connect(move |connection, _| {
            Box::pin(async move {
                if is_sqlite {
                    let pragmas = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; \
                                   PRAGMA busy_timeout = 10000;";
                    connection.execute(pragmas).await?;
                }
                Ok(())
            })
        });
        let url = if is_sqlite && !url.contains('?') { format!("{url}?mode=rwc") } else { url.to_owned() };
        Ok(Self { pool: options.connect(&url).await?, is_sqlite })
    }

    /// Brings the tables up to date. Safe to call from several processes.
    pub async fn migrate(&self) -> Result<(), DbError> {
        let sql = if self.is_sqlite {
            include_str!("../../migrations/sqlite/0001_start.sql")
        } else {
            include_str!("../../migrations/postgres/0001_start.sql")
        };
        let first = Migration::new(1, "start".into(), MigrationType::Simple, AssertSqlSafe(sql).into_sql_str(), false);
        Ok(Migrator::with_migrations(vec![first]).run(&self.pool).await?)
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), DbError> {
        sqlx::query("SELECT 1").execute(&self.pool).await?;
        Ok(())
    }

    pub fn is_sqlite(&self) -> bool {
        self.is_sqlite
    }

    /// `{now}` is the database's clock in unix seconds, `{skip}` passes over rows that others hold.
    fn sql(&self, text: &str) -> AssertSqlSafe<String> {
        let now = if self.is_sqlite { "unixepoch()" } else { "CAST(extract(epoch FROM now()) AS BIGINT)" };
        let skip = if self.is_sqlite { "" } else { "FOR UPDATE SKIP LOCKED" };
        AssertSqlSafe(text.replace("{now}", now).replace("{skip}", skip))
    }
}

/// A JSON column.
fn json<T: serde::de::DeserializeOwned>(row: &AnyRow, column: &str) -> Result<T, DbError> {
    let text: String = row.try_get(column)?;
    serde_json::from_str(&text).map_err(|e| DbError::Corrupt(format!("{column}: {e}")))
}

fn optional_json<T: serde::de::DeserializeOwned>(row: &AnyRow, column: &str) -> Result<Option<T>, DbError> {
    let text: Option<String> = row.try_get(column)?;
    text.map(|text| serde_json::from_str(&text).map_err(|e| DbError::Corrupt(format!("{column}: {e}")))).transpose()
}

fn to_json(value: &impl serde::Serialize) -> Result<String, DbError> {
    serde_json::to_string(value).map_err(|e| DbError::Corrupt(e.to_string()))
}
