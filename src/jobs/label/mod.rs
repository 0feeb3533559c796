//! One attempt at a task that labels pairs. Each row of the file is written down when it is through, so that another
//! attempt goes on behind it.

mod panel;
mod row;

use std::{collections::HashSet, io::Cursor, time::Duration};

use anyhow::Context as _;
use futures::StreamExt;
use tokio::sync::watch;

use self::row::Desk;
use super::{Context, judge::SeatError, now};
use crate::{
    data::{self, DataError},
    db::DbError,
    domain::{Failure, FileRecord, LabelReport, Labelled, Labelling, Outcome, id},
    objectives::grade::GradeError,
    storage::{Key, StorageError},
};

/// Rows under way at once.
const TOGETHER: usize = 8;
/// Seconds between heartbeats, of a lease, and before an attempt that a passing fault ended is followed by another.
const HEARTBEAT: Duration = Duration::from_secs(2);
pub(super) const LEASE: i64 = 90;
const PAUSE: i64 = 8;
/// Heartbeats in a row that may fail.
const MISSED: u32 = 30;

/// Why an attempt ended without a dataset.
enum Stop {
    Failed(Failure),
    Fenced,
    Cancelled,
    Drained,
    Again(anyhow::Error),
}

fn failed(code: &str, message: impl Into<String>, param: Option<&str>) -> Stop {
    Stop::Failed(Failure { code: code.to_owned(), message: message.into(), param: param.map(str::to_owned) })
}

impl From<DbError> for Stop {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Fenced => Stop::Fenced,
            error => Stop::Again(error.into()),
        }
    }
}

/// Runs an attempt and writes how it ended.
pub(super) async fn attempt(context: &Context, task: Labelling, stopped: watch::Receiver<bool>) -> anyhow::Result<()> {
    tracing::info!(task.id = task.id, fence = task.fence, "labelling started");
    let ended = tokio::select! {
        stop = watch_over(context, &task, stopped) => Err(stop),
        ended = label(context, &task) => ended,
    };
    let db = &context.db;
    let written = match ended {
        Ok(()) | Err(Stop::Fenced) => Ok(()),
        Err(Stop::Failed(failure)) => db.fail_labelling(&task, &failure).await,
        Err(Stop::Cancelled) => db.labelling_cancelled(&task).await,
        Err(Stop::Drained) => db.release_labelling(&task, 0).await,
        Err(Stop::Again(error)) => {
            tracing::warn!(task.id = task.id, pause_s = PAUSE, "a passing fault ended the attempt: {error:#}");
            db.release_labelling(&task, PAUSE).await
        }
    };
    match written {
        Err(DbError::Fenced) => Ok(()),
        other => Ok(other?),
    }
}

/// Keeps the lease until the attempt has to end.
async fn watch_over(context: &Context, task: &Labelling, mut stopped: watch::Receiver<bool>) -> Stop {
    let mut missed = 0;
    loop {
        if *stopped.borrow() {
            return Stop::Drained;
        }
        match context.db.heartbeat_labelling(task, LEASE).await {
            Ok(Some(_)) => return Stop::Cancelled,
            Ok(None) => missed = 0,
            Err(DbError::Fenced) => return Stop::Fenced,
            Err(error) => {
                missed += 1;
                tracing::warn!(task.id = task.id, "heartbeat failed: {error}");
                if missed > MISSED {
                    return Stop::Fenced;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(HEARTBEAT) => {}
            _ = stopped.changed() => {}
        }
    }
}

async fn label(context: &Context, task: &Labelling) -> Result<(), Stop> {
    let rows = rows(context, task).await?;
    let desk = Desk::open(&context.means(), task).await.map_err(|error| match error {
        SeatError::Unknown(_) => failed("spec_unknown_model", error.to_string(), None),
        SeatError::Db(error) => error.into(),
    })?;
    let before = context.db.labels(&task.id).await?;
    let through: HashSet<u64> = before.iter().map(|(line, _)| *line).collect();
    let mut faults = before.iter().filter_map(|(_, label)| fault(label)).count();
    let left = rows.iter().filter(|row| !through.contains(&row.line));
    let work: Vec<_> = left.map(|row| line(&desk, row)).collect();
    let mut labels = futures::stream::iter(work).buffer_unordered(TOGETHER);
    while let Some((line, label)) = labels.next().await {
        let label =
            label.map_err(|error| failed("spec_invalid_grader", format!("line {line}: {error}"), Some("judge")))?;
        context.db.record_label(task, line, &label).await?;
        let Some(why) = fault(&label) else { continue };
        faults += 1;
        let most = task.spec.max_dropped;
        if faults as f64 > most * rows.len() as f64 {
            let message = format!("{faults} of {} rows have no label: {why}. max_dropped is {most}", rows.len());
            return Err(failed("grader_failed", message, Some("judge")));
        }
    }
    finish(context, task).await
}

async fn line(desk: &Desk<'_>, row: &data::Compared) -> (u64, Result<Labelled, GradeError>) {
    (row.line, desk.label(row).await)
}

/// Why a row has no label, where that is somebody's fault.
fn fault(label: &Labelled) -> Option<String> {
    match &label.outcome {
        Outcome::Dropped(why, said) if why.is_fault() => Some(said.clone().unwrap_or_else(|| why.name().to_owned())),
        _ => None,
    }
}

async fn rows(context: &Context, task: &Labelling) -> Result<Vec<data::Compared>, Stop> {
    let file = &task.spec.file;
    let bytes = match context.store.get(&Key::File { id: file.clone() }).await {
        Ok(bytes) => bytes,
        Err(StorageError::NotFound(_)) => {
            return Err(failed("dataset_missing", format!("the file {file} was deleted"), Some("file")));
        }
        Err(error) => return Err(Stop::Again(error.into())),
    };
    let read = tokio::task::spawn_blocking(move || data::compared(Cursor::new(bytes)));
    match read.await.context("reading the file").map_err(Stop::Again)? {
        Ok(rows) => Ok(rows),
        Err(DataError::Read(error)) => Err(Stop::Again(error.into())),
        Err(DataError::Line(line)) => Err(failed(
            &format!("dataset_{}", line.code),
            format!("line {}: {}", line.line, line.message),
            Some("file"),
        )),
        Err(error @ DataError::Empty) => Err(failed("dataset_empty", error.to_string(), Some("file"))),
    }
}

async fn finish(context: &Context, task: &Labelling) -> Result<(), Stop> {
    let labels: Vec<Labelled> = context.db.labels(&task.id).await?.into_iter().map(|(_, label)| label).collect();
    let report = LabelReport::of(&labels);
    if report.rows == 0 {
        let dropped: Vec<String> = report.dropped.iter().map(|(why, n)| format!("{n} {why}")).collect();
        let message = format!("none of {} rows has a label: {}", labels.len(), dropped.join(", "));
        return Err(failed("dataset_empty", message, None));
    }
    let mut text = Vec::new();
    for label in &labels {
        if let Outcome::Row(row) = &label.outcome {
            serde_json::to_writer(&mut text, row).map_err(|error| Stop::Again(error.into()))?;
            text.push(b'\n');
        }
    }
    let file = id::new("file-");
    let stored = context.store.put(&Key::File { id: file.clone() }, text.into()).await;
    let stored = stored.map_err(|error| Stop::Again(error.into()))?;
    let record = FileRecord {
        id: file,
        project: task.project.clone(),
        filename: "preferences.jsonl".to_owned(),
        purpose: "fine-tune".to_owned(),
        bytes: stored.bytes as i64,
        sha256: stored.sha256,
        status: "processed".to_owned(),
        status_details: None,
        created_at: now(),
    };
    Ok(context.db.finish_labelling(task, &record, &report).await?)
}
