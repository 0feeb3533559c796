//! Places in the queue and in the batch: bounded, and free as soon as nobody waits for the answer.

use std::time::{Duration, Instant};

use attune::{
    inference::{EngineError, EngineSettings, Finish, Request},
    service::{Fault, Problem},
};

use super::{Bench, ask, collect, run, settings, so_far};
use crate::support::faulty::Latch;

const QUEUE: usize = 5;

fn small() -> EngineSettings {
    EngineSettings { queue: QUEUE, max_batch: 1, ..settings() }
}

fn is_full(bench: &Bench) -> bool {
    match bench.engine.submit(ask(None, 4, 4)) {
        Ok(_) => false,
        Err(error) => {
            assert_eq!(error, EngineError::Full { limit: QUEUE });
            assert!(
                matches!(Problem::from(error), Problem { fault: Fault::Busy, code: Some(code), .. } if code == "queue_full")
            );
            true
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_takes_as_many_as_it_says() {
    let bench = Bench::start(small()).await;
    let (latch, held) = bench.hold("queue").await;
    let waiting: Vec<_> = (0..QUEUE).map(|_| bench.engine.submit(ask(None, 4, 4)).unwrap()).collect();
    assert!(is_full(&bench));
    assert_eq!((bench.engine.status().waiting, bench.engine.status().running), (QUEUE, 1));
    latch.open();
    for receiver in waiting.into_iter().chain([held]) {
        collect(receiver).await.ok();
    }
    bench.until(|status| (status.waiting, status.running) == (0, 0)).await;
    assert!(!is_full(&bench));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_the_line_frees_the_place() {
    let bench = Bench::start(small()).await;
    let mut long = bench.engine.submit(ask(None, 4, 500)).unwrap();
    long.recv().await.unwrap();
    let waiting: Vec<_> = (0..QUEUE).map(|_| bench.engine.submit(ask(None, 4, 4)).unwrap()).collect();
    assert!(is_full(&bench));
    drop(waiting);
    bench.until(|status| status.waiting == 0).await;
    assert_eq!(bench.engine.status().running, 1, "before the turn came");
    assert!(so_far(&mut long).end.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_wait_for_a_cold_adapter_any_more_frees_the_place() {
    let bench = Bench::start(small()).await;
    let adapter = bench.several(1).await.remove(0);
    bench.store.shut();
    let waiting: Vec<_> = (0..QUEUE).map(|_| bench.engine.submit(ask(Some(&adapter), 4, 4)).unwrap()).collect();
    bench.until(|status| status.adapters == 1).await;
    assert!(is_full(&bench));
    drop(waiting);
    bench.until(|status| status.waiting == 0).await;
    assert!(!is_full(&bench));
    bench.store.open();
    run(&bench.engine, ask(Some(&adapter), 4, 4)).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_ends_its_sequence_within_a_step() {
    let bench = Bench::start(settings()).await;
    let adapter = bench.several(1).await.remove(0);
    run(&bench.engine, ask(Some(&adapter), 4, 1)).await.ok();
    let (latch, held) = bench.hold("gone").await;
    let gone = bench.engine.submit(ask(Some(&adapter), 4, 400)).unwrap();
    let stays = bench.engine.submit(ask(None, 4, 2)).unwrap();
    drop(gone);
    let before = bench.base("dense").forward_count();
    latch.open();
    collect(held).await.ok();
    collect(stays).await.ok();
    bench.until(|status| status.running == 0).await;
    assert_eq!(bench.base("dense").forward_count() - before, 2, "nobody computes for the one that went");
    let mut reads = bench.engine.submit(ask(None, 4, 400)).unwrap();
    reads.recv().await.unwrap();
    let before = bench.base("dense").forward_count();
    bench.until(|status| status.running == 1).await;
    drop(reads);
    bench.until(|status| status.running == 0).await;
    assert!(bench.base("dense").forward_count() - before < 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_what_speaks_and_refuses_what_has_not_begun() {
    let bench = Bench::start(small()).await;
    let adapter = bench.fault("holds deadline").await;
    let latch = Latch::named("holds deadline");
    latch.open();
    run(&bench.engine, ask(Some(&adapter), 3, 1)).await.ok();
    let deadline = Instant::now() + Duration::from_millis(400);
    let late = |request: Request| bench.engine.submit(Request { deadline: Some(deadline), ..request }).unwrap();
    let mut speaks = late(ask(Some(&adapter), 3, 500));
    speaks.recv().await.unwrap();
    latch.close();
    latch.reached().await;
    let waits = late(ask(None, 4, 4));
    let patient = bench.engine.submit(ask(None, 4, 4)).unwrap();
    tokio::time::sleep_until(deadline.into()).await;
    latch.open();
    let ended = collect(speaks).await.ok();
    assert_eq!(ended.end, Some(Ok(Finish::Length)));
    assert!(ended.tokens.len() < 499, "it was over before its deadline");
    let error = collect(waits).await.error();
    assert_eq!(error, EngineError::Timeout);
    assert_eq!(Problem::from(error).fault, Fault::Unavailable);
    collect(patient).await.ok();
}
