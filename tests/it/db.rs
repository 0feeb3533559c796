//! One suite for both databases: each behaviour is a function over an empty store, run on SQLite and on PostgreSQL.

mod aliases;
mod audit;
mod batches;
mod feedback;
mod labellings;
mod lists;
mod migrations;
mod names;
mod once;
mod processes;
mod queue;
mod steering;
mod uploads;

use std::future::Future;

use attune::{
    db::{CheckpointRecord, Claim, Db, NewEvent, Publication},
    domain::{AdapterRecord, Caller, FileRecord, Job, MethodSpec, Metrics, id},
};
use serde_json::json;
use sqlx::{AnyPool, any::AnyPoolOptions};

use crate::support::postgres::Postgres;

/// The base of the jobs here.
const BASE: &str = "tiny";

/// An empty database with its tables.
struct Store {
    db: Db,
    url: String,
    /// A way round the code under test.
    raw: AnyPool,
}

impl Store {
    async fn open(url: String) -> Self {
        let db = Db::connect(&url).await.unwrap();
        db.migrate().await.unwrap();
        let raw = AnyPoolOptions::new().connect(&url).await.unwrap();
        Self { db, url, raw }
    }

    /// The same database, as another process sees it.
    async fn other(&self) -> Db {
        Db::connect(&self.url).await.unwrap()
    }

    async fn claim(&self, worker: &str, lease: i64) -> Option<Claim> {
        self.db.claim(worker, &[BASE], lease).await.unwrap()
    }

    async fn insert(&self, job: &Job) {
        self.db.insert_job("key-a", job, None).await.unwrap();
    }

    async fn job(&self, id: &str) -> Job {
        self.db.job("p", id).await.unwrap()
    }

    /// How many rows a table has.
    async fn count(&self, table: &str) -> i64 {
        let sql = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}"));
        sqlx::query_scalar(sql).fetch_one(&self.raw).await.unwrap()
    }

    async fn run(&self, sql: &'static str) {
        sqlx::query(sql).execute(&self.raw).await.unwrap();
    }
}

async fn on_sqlite<F: Future<Output = ()>>(behaviour: impl FnOnce(Store) -> F) {
    let dir = tempfile::tempdir().unwrap();
    behaviour(Store::open(format!("sqlite:{}/a.db", dir.path().display())).await).await;
}

async fn on_postgres<F: Future<Output = ()>>(behaviour: impl FnOnce(Store) -> F) {
    if let Some(postgres) = Postgres::start().await {
        behaviour(Store::open(postgres.url.clone()).await).await;
    }
}

/// Each behaviour as two tests.
macro_rules! on_both {
    ($($behaviour:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $behaviour() {
                crate::db::on_sqlite(super::$behaviour).await;
            })+
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $behaviour() {
                crate::db::on_postgres(super::$behaviour).await;
            })+
        }
    };
}
use on_both;

fn caller(project: &str, key: &str) -> Caller {
    Caller { project: project.to_owned(), key: key.to_owned() }
}

/// A queued job of the project `p`. All are of the same second.
fn a_job(priority: i64) -> Job {
    let id = id::new("ftjob-");
    let adapter = MethodSpec::from_json(&json!({"type": "lora", "r": 4, "alpha": 12})).unwrap();
    let training = json!({
        "n_epochs": 3, "batch_size": 2, "learning_rate": 0.01, "lr_scheduler": "linear", "warmup_ratio": 0.0,
        "max_steps": null, "max_seq_len": 64, "packing": false, "grad_accumulation": 1, "max_grad_norm": 1.0,
        "weight_decay": 0.0, "eval_every": null, "checkpoint_every": null, "early_stopping": null,
        "validation_split": 0.0, "precision": "f32",
    });
    let spec = json!({
        "base": BASE, "continue_from": null, "suffix": null, "adapter": adapter, "objective": {"type": "supervised"},
        "training": training, "seed": 5,
    });
    let job = json!({
        "id": id, "project": "p", "created_at": 1_800_000_000, "status": "queued", "model": BASE,
        "training_file": "file-a", "spec": spec, "priority": priority, "output_model": format!("ft:{BASE}:p::{id}"),
        "result_files": [], "fence": 0, "barren_attempts": 0,
    });
    serde_json::from_value(job).unwrap()
}

fn a_file(project: &str) -> FileRecord {
    FileRecord {
        id: id::new("file-"),
        project: project.to_owned(),
        filename: "a.jsonl".to_owned(),
        purpose: "fine-tune".to_owned(),
        bytes: 3,
        sha256: "abc".to_owned(),
        status: "processed".to_owned(),
        status_details: None,
        created_at: 1_800_000_000,
    }
}

fn an_adapter(project: &str, model: &str, job: Option<(&Job, Option<i64>)>, generation: &str) -> AdapterRecord {
    AdapterRecord {
        id: id::new("adapter-"),
        project: project.to_owned(),
        model: model.to_owned(),
        parent: BASE.to_owned(),
        method: "lora".to_owned(),
        generation: generation.to_owned(),
        bytes: 7,
        created_at: 1_800_000_000,
        job_id: job.map(|(job, _)| job.id.clone()),
        step: job.and_then(|(_, step)| step),
        virtual_tokens: 5,
    }
}

fn a_checkpoint(job: &Job, step: i64) -> CheckpointRecord {
    CheckpointRecord {
        id: id::new("ftckpt_"),
        job_id: job.id.clone(),
        created_at: 1_800_000_000,
        fence: job.fence,
        step,
        model: format!("{}:ckpt-step-{step}", job.output_model),
        files: Vec::new(),
        metrics: Metrics::default(),
    }
}

fn a_publication(job: &Job) -> Publication {
    Publication {
        adapter: an_adapter("p", &job.output_model, Some((job, None)), "g"),
        result_file: a_file("p"),
        trained_tokens: 11,
    }
}

/// The metrics of a step.
fn step(step: u64) -> NewEvent {
    NewEvent::metrics(&Metrics { step, total_steps: 9, train_loss: Some(2.5), ..Metrics::default() })
}
