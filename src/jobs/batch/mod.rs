//! Batches in the background: a runner claims one, asks the server its requests at low priority, and writes the files
//! of results. What was answered is kept line by line, so that after a crash no line is asked again.

mod input;
mod output;
mod run;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde_json::{Map, Value};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use crate::{
    db::{Db, DbError},
    domain::{BatchRecord, BatchStatus, Endpoint},
    storage::BlobStore,
};

/// Seconds of a lease and between heartbeats.
const LEASE: i64 = 60;
const HEARTBEAT: Duration = Duration::from_secs(1);
/// The timer beside the signal.
const LOOK: Duration = Duration::from_secs(2);
/// Batches that a process has in hand at once.
const RUNNERS: usize = 2;

/// What the server says to a request.
pub struct Answered {
    /// HTTP's.
    pub status: u16,
    pub request_id: String,
    pub body: Value,
}

/// Answers a request of a batch as its endpoint would, after everything that somebody waits for.
#[async_trait]
pub trait Answers: Send + Sync {
    async fn answer(&self, project: &str, endpoint: Endpoint, body: Map<String, Value>) -> Answered;
}

/// What a runner works with.
#[derive(Clone)]
pub struct BatchContext {
    pub db: Db,
    pub store: Arc<dyn BlobStore>,
    pub answers: Arc<dyn Answers>,
}

/// The running tasks.
pub struct Runners {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Runners {
    /// Gives the batches in hand back and ends.
    pub async fn stop(self) {
        _ = self.stop.send(true);
        for ended in futures::future::join_all(self.tasks).await {
            if let Err(error) = ended {
                tracing::error!("a runner of batches crashed: {error}");
            }
        }
    }
}

/// Works until it is stopped. It looks for a batch when it is woken, and every few seconds.
pub fn start(context: BatchContext, wake: Arc<Notify>) -> Runners {
    let (stop, stopped) = watch::channel(false);
    let tasks = (0..RUNNERS).map(|_| tokio::spawn(work(context.clone(), wake.clone(), stopped.clone())));
    Runners { tasks: tasks.collect(), stop }
}

async fn work(context: BatchContext, wake: Arc<Notify>, mut stopped: watch::Receiver<bool>) {
    while !*stopped.borrow() {
        // Registered before the look, so that a batch made in between is not missed.
        let woken = wake.notified();
        match context.db.claim_batch(LEASE).await {
            Ok(Some(batch)) => {
                run_claim(&context, batch, stopped.clone()).await;
                continue;
            }
            Ok(None) => {}
            Err(error) => tracing::error!("batches cannot be claimed: {error}"),
        }
        tokio::select! {
            () = woken => {}
            () = tokio::time::sleep(LOOK) => {}
            _ = stopped.changed() => {}
        }
    }
}

/// Why the requests that are left are not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Halt {
    Cancelled,
    /// Its window ran out.
    Late,
    /// The process goes away.
    Drain,
    /// Another has the batch.
    Lost,
}

async fn run_claim(context: &BatchContext, batch: BatchRecord, stopped: watch::Receiver<bool>) {
    tracing::info!(batch.id = batch.id, fence = batch.fence, "batch claimed");
    let (halt, halted) = watch::channel(None);
    let heart = tokio::spawn(beat(context.db.clone(), batch.clone(), halt, stopped));
    // In a task of its own: what crashes there ends this attempt and not the runner.
    let attempt = tokio::spawn(run::attempt(context.clone(), batch.clone(), halted));
    match attempt.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::error!(batch.id = batch.id, "the batch waits for another attempt: {error:#}");
            tokio::time::sleep(LOOK).await;
        }
        Err(error) => tracing::error!(batch.id = batch.id, "a batch's attempt crashed: {error}"),
    }
    heart.abort();
}

async fn beat(db: Db, batch: BatchRecord, halt: watch::Sender<Option<Halt>>, mut stopped: watch::Receiver<bool>) {
    loop {
        let why = match db.beat_batch(&batch, LEASE).await {
            _ if *stopped.borrow() => Some(Halt::Drain),
            Ok(standing) if standing.status == BatchStatus::Cancelling => Some(Halt::Cancelled),
            Ok(standing) if standing.is_late => Some(Halt::Late),
            Ok(_) => None,
            Err(DbError::Fenced) => Some(Halt::Lost),
            Err(error) => {
                // Writes of an attempt whose lease ran out are refused by its fence.
                tracing::warn!(batch.id = batch.id, "heartbeat failed: {error}");
                None
            }
        };
        if why.is_some() {
            _ = halt.send(why);
        }
        if matches!(why, Some(Halt::Drain | Halt::Lost)) {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(HEARTBEAT) => {}
            _ = stopped.changed() => {}
        }
    }
}
