//! One attempt at a batch.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, TryStreamExt};
use tokio::sync::watch;

use super::{
    BatchContext, Halt,
    input::{self, Asked},
    output,
};
use crate::{
    db::DbError,
    domain::{BatchRecord, BatchStatus},
};

/// Requests of a batch that are asked at once.
const AT_ONCE: usize = 8;
/// Attempts at a request while the server is too busy or its store is away.
const ATTEMPTS: u32 = 20;
/// The longest pause between two of them.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// Lines that are written at once.
const GROUP: usize = 500;

/// Goes on where the last attempt ended. An error leaves the batch to another attempt.
pub async fn attempt(
    context: BatchContext,
    batch: BatchRecord,
    halted: watch::Receiver<Option<Halt>>,
) -> anyhow::Result<()> {
    match go_on(&context, &batch, halted).await {
        // Another has it.
        Err(error) if matches!(error.downcast_ref(), Some(DbError::Fenced)) => Ok(()),
        other => other,
    }
}

async fn go_on(
    context: &BatchContext,
    batch: &BatchRecord,
    mut halted: watch::Receiver<Option<Halt>>,
) -> anyhow::Result<()> {
    if batch.status == BatchStatus::Validating {
        match input::check(context, batch).await? {
            Ok(checked) => context.db.start_batch(batch, checked.total, checked.model.as_deref()).await?,
            Err(errors) => return Ok(context.db.fail_batch(batch, &errors).await?),
        }
    }
    let halt = match batch.status {
        BatchStatus::Finalizing => None,
        BatchStatus::Cancelling => Some(Halt::Cancelled),
        _ => tokio::select! {
            biased;
            halt = halted.wait_for(Option::is_some) => halt.map_or(Some(Halt::Drain), |halt| *halt),
            asked = ask_all(context, batch) => asked.map(|()| None)?,
        },
    };
    let end = match halt {
        Some(Halt::Lost) => return Ok(()),
        Some(Halt::Drain) => return Ok(context.db.release_batch(batch).await?),
        Some(Halt::Cancelled) => BatchStatus::Cancelled,
        Some(Halt::Late) => {
            give_up(context, batch).await?;
            BatchStatus::Expired
        }
        None => {
            context.db.finalize_batch(batch).await?;
            // A cancellation may have come before this.
            match context.db.batch(&batch.project, &batch.id).await?.status {
                BatchStatus::Cancelling => BatchStatus::Cancelled,
                _ => BatchStatus::Completed,
            }
        }
    };
    let (answers, errors) = (output::write(context, batch, true).await?, output::write(context, batch, false).await?);
    Ok(context.db.end_batch(batch, end, answers.as_ref(), errors.as_ref()).await?)
}

/// Asks what has not been answered, some requests side by side. Dropping it drops those under way.
async fn ask_all(context: &BatchContext, batch: &BatchRecord) -> anyhow::Result<()> {
    let done = Arc::new(context.db.finished_lines(batch).await?);
    let left = input::requests(context, batch).await?.try_filter(move |asked| {
        let is_left = !done.contains(&asked.line);
        async move { is_left }
    });
    left.try_for_each_concurrent(AT_ONCE, |asked| async move {
        let line = ask(context, batch, &asked).await;
        Ok(context.db.record_lines(batch, &[line]).await?)
    })
    .await
}

/// Asks until there is an answer: to wait is what a batch is for.
async fn ask(context: &BatchContext, batch: &BatchRecord, asked: &Asked) -> crate::domain::BatchLine {
    let mut attempt = 1;
    loop {
        let answered = context.answers.answer(&batch.project, batch.endpoint, asked.body.clone()).await;
        if !matches!(answered.status, 429 | 503) || attempt == ATTEMPTS {
            return output::answered(asked, answered);
        }
        tokio::time::sleep((Duration::from_millis(50) * 2u32.saturating_pow(attempt)).min(MAX_PAUSE)).await;
        attempt += 1;
    }
}

/// Says of every request without an answer that its time ran out.
async fn give_up(context: &BatchContext, batch: &BatchRecord) -> anyhow::Result<()> {
    let done = context.db.finished_lines(batch).await?;
    let requests = input::requests(context, batch).await?.try_filter(|asked| {
        let is_left = !done.contains(&asked.line);
        async move { is_left }
    });
    let mut groups = requests.map_ok(|asked| output::expired(&asked)).try_chunks(GROUP).boxed();
    while let Some(group) = groups.next().await {
        context.db.record_lines(batch, &group.map_err(|error| error.1)?).await?;
    }
    Ok(())
}
