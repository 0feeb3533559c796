//! The loop that claims jobs, and the heart that beats while one runs.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use super::{Context, label, observe::Signals, run};
use crate::{
    db::{Claim, DbError},
    domain::{Job, id},
};

/// Seconds between heartbeats, of a lease, and without a heartbeat's success after which an attempt stops itself.
const HEARTBEAT: Duration = Duration::from_secs(2);
const LEASE: i64 = 90;
const SILENCE: Duration = Duration::from_secs(60);
/// The timer beside the signal: other processes' jobs and expired leases are found by it.
const LOOK: Duration = Duration::from_secs(2);

/// A running worker.
pub struct Worker {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Worker {
    /// Lets the running job write a checkpoint and give its claim back, then ends.
    pub async fn stop(self) {
        _ = self.stop.send(true);
        if let Err(error) = self.task.await {
            tracing::error!("the worker crashed: {error}");
        }
    }
}

/// Works on one job at a time until it is stopped. It looks for a job when it is woken, and every few seconds.
pub fn start(context: Context, wake: Arc<Notify>) -> Worker {
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(work(context, wake, stopped));
    Worker { stop, task }
}

async fn work(context: Context, wake: Arc<Notify>, mut stopped: watch::Receiver<bool>) {
    let name = id::new("worker-");
    let bases: Vec<&str> = context.bases.iter().map(|resident| resident.base.info.id.as_str()).collect();
    while !*stopped.borrow() {
        // Registered before the look, so that a job queued in between is not missed.
        let woken = wake.notified();
        match context.db.claim(&name, &bases, LEASE).await {
            Ok(Some(claim)) => {
                run_claim(&context, claim, stopped.clone()).await;
                continue;
            }
            Ok(None) => {}
            Err(error) => tracing::error!("jobs cannot be claimed: {error}"),
        }
        match context.db.claim_labelling(&name, &bases, label::LEASE).await {
            Ok(Some(task)) => {
                if let Err(error) = label::attempt(&context, task, stopped.clone()).await {
                    // The lease runs out by itself, and the next attempt goes on from the last label.
                    tracing::error!("labelling ended: {error:#}");
                }
                continue;
            }
            Ok(None) => {}
            Err(error) => tracing::error!("tasks cannot be claimed: {error}"),
        }
        tokio::select! {
            () = woken => {}
            () = tokio::time::sleep(LOOK) => {}
            _ = stopped.changed() => {}
        }
    }
}

async fn run_claim(context: &Context, claim: Claim, stopped: watch::Receiver<bool>) {
    let signals = Arc::new(Signals::default());
    let heart = tokio::spawn(beat(context.clone(), claim.job.clone(), signals.clone(), stopped.clone()));
    let job = claim.job.id.clone();
    tracing::info!(job.id = job, fence = claim.job.fence, "attempt started");
    if let Err(error) = run::attempt(context, claim, signals).await {
        // The database does not answer: the lease runs out by itself, and the next attempt goes on from the last
        // checkpoint.
        tracing::error!(job.id = job, "attempt ended: {error:#}");
        let mut stopped = stopped;
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = stopped.changed() => {}
        }
    }
    heart.abort();
}

async fn beat(context: Context, job: Job, signals: Arc<Signals>, mut stopped: watch::Receiver<bool>) {
    let mut last = Instant::now();
    loop {
        if *stopped.borrow() {
            signals.drain.store(true, Ordering::Relaxed);
        }
        match context.db.heartbeat(&job, LEASE).await {
            Ok(requested) => {
                signals.request(requested);
                last = Instant::now();
            }
            Err(DbError::Fenced) => {
                signals.lost.store(true, Ordering::Relaxed);
                return;
            }
            Err(error) => tracing::warn!(job.id = job.id, "heartbeat failed: {error}"),
        }
        if last.elapsed() > SILENCE {
            signals.lost.store(true, Ordering::Relaxed);
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(HEARTBEAT) => {}
            _ = stopped.changed() => {}
        }
    }
}
