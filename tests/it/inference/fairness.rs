//! Projects take turns.

use attune::inference::{EngineSettings, Request};

use super::{Bench, ask, collect, settings, so_far};

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_one_project_does_not_starve_another() {
    let bench = Bench::start(EngineSettings { max_batch: 1, ..settings() }).await;
    // Another project's request that keeps the engine inside its step, so that what was done before can be counted.
    let adapter = bench.fault("holds small").await;
    let (latch, loaded) = bench.hold_with(&adapter, "small").await;
    latch.open();
    collect(loaded).await.ok();
    latch.close();
    let (gate, held) = bench.hold("flood").await;
    let of = |project: &str, request: Request| Request { project: project.to_owned(), ..request };
    let flood: Vec<_> = (0..8).map(|i| bench.engine.submit(of("flood", ask(None, 6 + i, 20))).unwrap()).collect();
    let small = bench.engine.submit(of("small", ask(Some(&adapter), 5, 1))).unwrap();
    let background = Request { is_background: true, ..of("small", ask(None, 5, 1)) };
    let mut background = bench.engine.submit(background).unwrap();
    gate.open();
    collect(held).await.ok();
    latch.reached().await;
    let mut flood = flood;
    let done = flood.iter_mut().map(so_far).filter(|answer| answer.end.is_some()).count();
    assert_eq!(done, 1, "the flood's first came first; the small project is next");
    assert!(so_far(&mut background).end.is_none());
    latch.open();
    collect(small).await.ok();
    // Background work comes when nothing else waits, whoever's it is.
    collect(background).await.ok();
    assert_eq!(flood.iter_mut().map(so_far).filter(|answer| answer.end.is_some()).count(), 7);
}
