//! The training thread's listener: every step and checkpoint is durable before the next begins.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use tokio::runtime::Handle;

use super::{
    Context, now,
    publish::{publish_adapter, put_checked},
};
use crate::{
    db::{CheckpointRecord, NewEvent},
    domain::{AdapterRecord, Control, Job, Live, Metrics, Observer, Snapshot, id},
    inference::{AdapterRef, LiveRun, Resident, Shown, adapter_of},
    storage::Key,
};

/// What the worker tells a running attempt.
#[derive(Default)]
pub struct Signals {
    /// The lease is lost: stop at once, nothing may be written.
    pub lost: AtomicBool,
    /// The process goes away.
    pub drain: AtomicBool,
    /// What the user asked for: `pause` or `cancel`.
    pub requested: Mutex<Option<String>>,
}

impl Signals {
    pub fn request(&self, wish: Option<String>) {
        *self.requested.lock().unwrap_or_else(|e| e.into_inner()) = wish;
    }

    fn control(&self) -> Control {
        let requested = self.requested.lock().unwrap_or_else(|e| e.into_inner());
        match requested.as_deref() {
            Some("cancel") => Control::Cancel,
            Some("pause") => Control::Pause,
            _ if self.drain.load(Ordering::Relaxed) => Control::Drain,
            _ => Control::Continue,
        }
    }
}

/// Writes to the database and the store from a thread without a runtime of its own.
pub struct JobObserver {
    pub context: Context,
    pub job: Job,
    pub resident: Resident,
    pub signals: Arc<Signals>,
    pub runtime: Handle,
    /// When this attempt's first step began, and its number: for the estimate of the end.
    pub started: Option<(Instant, u64)>,
    /// What the run can be asked for under its names.
    pub shown: Option<Shown>,
}

impl JobObserver {
    fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.signals.lost.load(Ordering::Relaxed), "the lease on the job is lost");
        Ok(())
    }

    fn estimate(&mut self, metrics: &Metrics) -> Option<i64> {
        let (since, first) = *self.started.get_or_insert((Instant::now(), metrics.step));
        let done = metrics.step.checked_sub(first).filter(|n| *n > 0)?;
        let left = metrics.total_steps.saturating_sub(metrics.step);
        Some(now() + (since.elapsed().as_secs_f64() / done as f64 * left as f64) as i64)
    }
}

impl Observer for JobObserver {
    fn begun(&mut self, live: Arc<dyn Live>) -> anyhow::Result<()> {
        let (job, method) = (&self.job, self.job.spec.adapter.type_name());
        let run = LiveRun::new(&job.id, method, &self.resident, live);
        self.shown = Some(self.context.engine.lives().show(&job.project, &[&job.id, &job.output_model], run));
        Ok(())
    }

    fn step(&mut self, metrics: &Metrics) -> anyhow::Result<Control> {
        self.check()?;
        let estimate = self.estimate(metrics);
        let events = [NewEvent::metrics(metrics)];
        let requested = self.runtime.block_on(self.context.db.record(&self.job, &events, estimate))?;
        self.signals.request(requested);
        Ok(self.signals.control())
    }

    fn checkpoint(&mut self, snapshot: Snapshot, metrics: &Metrics) -> anyhow::Result<()> {
        self.check()?;
        let context = &self.context;
        let (job, step) = (&self.job, snapshot.step);
        self.runtime.block_on(async {
            let mut listed = Vec::new();
            let files = adapter_of(&snapshot).filter(|_| step > 0);
            for (name, bytes) in snapshot.files {
                let key = Key::Checkpoint { job: job.id.clone(), fence: job.fence, step, name };
                listed.push(put_checked(&context.store, &key, bytes.into()).await?);
            }
            let method = job.spec.adapter.type_name();
            let model = format!("{}:ckpt-step-{step}", job.output_model);
            let adapter = match files {
                Some(files) => {
                    let manifest = publish_adapter(&context.store, &files, &self.resident.base.info, method).await?;
                    let record = AdapterRecord {
                        id: id::new("adapter-"),
                        project: job.project.clone(),
                        model: model.clone(),
                        parent: self.resident.base.info.id.clone(),
                        method: method.to_owned(),
                        generation: manifest.generation,
                        bytes: manifest.files.iter().map(|f| f.bytes as i64).sum(),
                        created_at: now(),
                        job_id: Some(job.id.clone()),
                        step: Some(step as i64),
                        virtual_tokens: job.spec.adapter.virtual_tokens() as i64,
                    };
                    context.engine.keep(&self.resident, &AdapterRef::from(&record), &files);
                    Some(record)
                }
                None => None,
            };
            let record = CheckpointRecord {
                id: id::new("ftckpt_"),
                job_id: job.id.clone(),
                created_at: now(),
                fence: job.fence,
                step: step as i64,
                model,
                files: listed,
                metrics: metrics.clone(),
            };
            anyhow::Ok(context.db.record_checkpoint(job, &record, adapter.as_ref()).await?)
        })
    }

    fn message(&mut self, level: &str, text: &str) -> anyhow::Result<()> {
        self.check()?;
        let events = [NewEvent::at_level(level, text)];
        self.runtime.block_on(self.context.db.record(&self.job, &events, None))?;
        Ok(())
    }
}
