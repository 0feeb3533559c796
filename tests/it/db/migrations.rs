//! Tables are made and changed while other processes do the same, and rows of older tables go on.

use attune::{db::Db, domain::JobStatus};
use sqlx::{
    SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};

use super::{BASE, Store, a_job};
use crate::support::postgres::Postgres;

async fn four_at_once(url: &str) {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let url = url.to_owned();
        tasks.spawn(async move { Db::connect(&url).await?.migrate().await });
    }
    for done in tasks.join_all().await {
        done.unwrap();
    }
}

/// The tables as the first version made them, with a job in them.
async fn upgrade(url: &str, first: &'static str) {
    sqlx::any::install_default_drivers();
    let raw = sqlx::any::AnyPoolOptions::new().connect(url).await.unwrap();
    let first = Migration::new(1, "start".into(), MigrationType::Simple, first.into_sql_str(), false);
    Migrator::with_migrations(vec![first]).run(&raw).await.unwrap();
    let job = a_job(0);
    let sql = "INSERT INTO jobs (id, project, created_at, status, model, training_file, spec, priority, output_model, \
               result_files, fence, barren_attempts, next_seq) \
               VALUES ($1, 'p', 1, 'queued', 'm', 'file-a', $2, 0, 'ft:a', '[]', 0, 0, 0)";
    let query = sqlx::query(sql).bind(&job.id).bind(serde_json::to_string(&job.spec).unwrap());
    query.execute(&raw).await.unwrap();
    let store = Store::open(url.to_owned()).await;
    assert_eq!(store.claim("a", 90).await.unwrap().job.id, job.id);
    assert_eq!(store.job(&job.id).await.status, JobStatus::Running);
    assert_eq!(store.db.jobs("p", None, 5).await.unwrap().data.len(), 1);
    assert_eq!(store.job(&job.id).await.spec.base, BASE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sqlite() {
    let dir = tempfile::tempdir().unwrap();
    let url = |name: &str| format!("sqlite:{}/{name}", dir.path().display());
    for round in 0..5 {
        four_at_once(&url(&format!("{round}.db"))).await;
    }
    // An empty file is an empty database.
    std::fs::write(dir.path().join("old.db"), "").unwrap();
    upgrade(&url("old.db"), include_str!("../../../migrations/sqlite/0001_start.sql")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn postgres() {
    if let Some(postgres) = Postgres::start().await {
        four_at_once(&postgres.url).await;
    }
    if let Some(postgres) = Postgres::start().await {
        upgrade(&postgres.url, include_str!("../../../migrations/postgres/0001_start.sql")).await;
    }
}

/// What means something in a URL means itself in a path.
#[tokio::test]
async fn a_path_is_taken_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["plain.db", "a b%20c.db", "50%.db", "a#b?mode=ro&x.db", "ä+ö;.db"] {
        let path = dir.path().join(name);
        let db = Db::connect(&format!("sqlite:{}", path.display())).await.unwrap();
        db.migrate().await.unwrap();
        assert!(path.is_file(), "{name}");
    }
    let found = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(found.filter(|name| name.ends_with(".db")).count(), 5);
}
