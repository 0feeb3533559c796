//! All SQL. One query set for SQLite and PostgreSQL; every query of a user's data carries the project.

mod adapters;
mod aliases;
mod answers;
mod audit;
mod batch_queue;
mod batches;
mod checkpoints;
mod events;
mod feedback;
mod files;
mod jobs;
mod keys;
mod labellings;
mod pins;
mod queue;
mod uploads;

use std::{fmt::Write as _, time::Duration};

use sqlx::{
    AnyPool, AssertSqlSafe, Executor, Row, SqlSafeStr,
    any::{AnyPoolOptions, AnyRow},
    migrate::{Migration, MigrationType, Migrator},
};

pub use answers::Once;
pub use batch_queue::Standing;
pub use checkpoints::CheckpointRecord;
pub use feedback::FeedbackFilter;
pub use jobs::Wish;
pub use queue::{Claim, NewEvent, Publication};

/// The scripts, in order: never changed once published, only added to.
macro_rules! migrations {
    ($folder:literal) => {
        &[
            ("start", include_str!(concat!("../../migrations/", $folder, "/0001_start.sql"))),
            (
                "order actors answers",
                include_str!(concat!("../../migrations/", $folder, "/0002_order_actors_answers.sql")),
            ),
            ("feedback", include_str!(concat!("../../migrations/", $folder, "/0003_feedback.sql"))),
            ("uploads", include_str!(concat!("../../migrations/", $folder, "/0004_uploads.sql"))),
            ("virtual tokens", include_str!(concat!("../../migrations/", $folder, "/0005_virtual_tokens.sql"))),
            ("batches", include_str!(concat!("../../migrations/", $folder, "/0006_batches.sql"))),
            ("pins", include_str!(concat!("../../migrations/", $folder, "/0007_pins.sql"))),
            ("labellings", include_str!(concat!("../../migrations/", $folder, "/0008_labellings.sql"))),
            ("aliases", include_str!(concat!("../../migrations/", $folder, "/0009_aliases.sql"))),
        ]
    };
}
const SQLITE: &[(&str, &str)] = migrations!("sqlite");
const POSTGRES: &[(&str, &str)] = migrations!("postgres");

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
    /// Another request with this idempotency key was faster.
    #[error("a request with this idempotency key is under way")]
    Answered,
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

type Tx = sqlx::Transaction<'static, sqlx::Any>;

/// A pool of connections. Cheap to clone.
#[derive(Clone)]
pub struct Db {
    pool: AnyPool,
    is_sqlite: bool,
}

impl Db {
    /// `sqlite:PATH` (as it is, made if missing) or `postgres://…`.
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
        let url = match url.strip_prefix("sqlite:") {
            Some(path) => format!("sqlite:{}?mode=rwc", escaped(path)),
            None => url.to_owned(),
        };
        Ok(Self { pool: options.connect(&url).await?, is_sqlite })
    }

    /// Brings the tables up to date. Safe to call from several processes.
    pub async fn migrate(&self) -> Result<(), DbError> {
        let scripts = if self.is_sqlite { SQLITE } else { POSTGRES };
        let migration = |(number, (name, sql)): (i64, &(&'static str, &'static str))| {
            Migration::new(number, (*name).into(), MigrationType::Simple, AssertSqlSafe(*sql).into_sql_str(), false)
        };
        let migrations = (1..).zip(scripts).map(migration).collect();
        let migrator = Migrator::with_migrations(migrations);
        if !self.is_sqlite {
            // Under a lock of its own.
            return Ok(migrator.run(&self.pool).await?);
        }
        // In one transaction: of several processes that start on an empty file, one makes the tables.
        let mut tx = self.begin().await?;
        migrator.run_direct(None, &mut *tx, false).await?;
        Ok(tx.commit().await?)
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), DbError> {
        sqlx::query("SELECT 1").execute(&self.pool).await?;
        Ok(())
    }

    /// Where a row stands in its table, for the page behind it.
    async fn place(&self, table: &'static str, project: &str, id: &str) -> Result<i64, DbError> {
        let sql = self.sql(&format!("SELECT {{seq}} AS place FROM {table} WHERE project = $1 AND id = $2"));
        let row = sqlx::query(sql).bind(project).bind(id).fetch_optional(&self.pool).await?;
        Ok(row.ok_or(DbError::NotFound)?.try_get("place")?)
    }

    pub fn is_sqlite(&self) -> bool {
        self.is_sqlite
    }

    /// A transaction that will write. SQLite's takes the write lock at once and waits for it if it must: one that has
    /// read before it writes is refused as busy when another process wrote in between.
    async fn begin(&self) -> Result<Tx, DbError> {
        Ok(self.pool.begin_with(if self.is_sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" }).await?)
    }

    /// `{now}` is the database's clock in unix seconds, `{seq}` counts a table's rows up in the order of their making,
    /// `{lock}` holds the rows that are read, `{skip}` too but passes over those that others hold.
    fn sql(&self, text: &str) -> AssertSqlSafe<String> {
        let now = if self.is_sqlite { "unixepoch()" } else { "CAST(extract(epoch FROM now()) AS BIGINT)" };
        let (seq, lock, skip) =
            if self.is_sqlite { ("rowid", "", "") } else { ("seq", "FOR UPDATE", "FOR UPDATE SKIP LOCKED") };
        let text = text.replace("{now}", now).replace("{seq}", seq);
        AssertSqlSafe(text.replace("{lock}", lock).replace("{skip}", skip))
    }
}

/// A path as the part of a URL: `%`, `#`, `?` and spaces mean themselves.
fn escaped(path: &str) -> String {
    let mut text = String::new();
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => text.push(char::from(byte)),
            // Writing to a string cannot fail.
            _ => _ = write!(text, "%{byte:02X}"),
        }
    }
    text
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
