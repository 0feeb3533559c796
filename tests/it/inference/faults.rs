//! What goes wrong in one request ends that request, and nothing else.

use std::time::Duration;

use attune::inference::{AdapterRef, EngineError, EngineSettings, Finish, Request};
use serde_json::json;

use super::{Answer, Bench, ask, collect, run, settings};

/// Requests of healthy adapters and of the base, and what they say undisturbed.
async fn healthy(bench: &Bench) -> Vec<(Request, Answer)> {
    let adapters = bench.several(2).await;
    let mut all = Vec::new();
    for (i, adapter) in [None, Some(&adapters[0]), Some(&adapters[1]), Some(&adapters[1])].into_iter().enumerate() {
        let request = Request { prompt_logprobs: (i % 2 == 0).then_some(1), ..ask(adapter, 4 + 13 * i, 25) };
        all.push((request.clone(), run(&bench.engine, request).await.ok()));
    }
    let other = Request { base: "other".to_owned(), ..ask(None, 9, 25) };
    all.push((other.clone(), run(&bench.engine, other).await.ok()));
    all
}

/// Runs the healthy ones in one batch with two of `adapter`; gives the ends of those.
async fn beside(bench: &Bench, name: &str, healthy: &[(Request, Answer)], adapter: &AdapterRef) -> Vec<Answer> {
    let (latch, held) = bench.hold(name).await;
    let mut bad = vec![bench.engine.submit(ask(Some(adapter), 6, 9)).unwrap()];
    let receivers: Vec<_> = healthy.iter().map(|(request, _)| bench.engine.submit(request.clone()).unwrap()).collect();
    bad.push(bench.engine.submit(ask(Some(adapter), 18, 9)).unwrap());
    latch.open();
    collect(held).await.ok();
    for (receiver, (_, expected)) in receivers.into_iter().zip(healthy) {
        assert_eq!(&collect(receiver).await, expected, "{name}");
    }
    let mut ends = Vec::new();
    for receiver in bad {
        ends.push(collect(receiver).await);
    }
    // The engine goes on.
    let (request, expected) = &healthy[0];
    assert_eq!(&run(&bench.engine, request.clone()).await, expected);
    ends
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_or_failure_ends_only_the_sequences_at_fault() {
    // Small steps: some have read only a part of their prompts when it happens.
    let bench = Bench::start(EngineSettings { max_tokens_per_step: 8, ..settings() }).await;
    let healthy = healthy(&bench).await;
    // A second token comes as the first of them reads again, by itself.
    for (fault, tokens) in [("panics", [0, 0]), ("panics while decoding", [2, 1]), ("fails", [0, 0])] {
        let adapter = bench.fault(fault).await;
        // In memory before the batch comes together: its first use fails alone.
        let first = run(&bench.engine, ask(Some(&adapter), 5, 9)).await;
        assert!(matches!(first.error(), EngineError::Internal(_)), "{first:?}");
        for (answer, tokens) in beside(&bench, fault, &healthy, &adapter).await.iter().zip(tokens) {
            assert!(matches!(answer.error(), EngineError::Internal(_)), "{fault}: {answer:?}");
            assert_eq!(answer.tokens.len(), tokens, "{fault}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_that_are_no_numbers_make_no_tokens() {
    let bench = Bench::start(settings()).await;
    let healthy = healthy(&bench).await;
    let wild = bench.lora_of_size("dense", json!({"type": "lora", "r": 2, "alpha": 3}), 5, 1e25).await;
    for answer in beside(&bench, "no numbers", &healthy, &wild).await {
        assert_eq!((answer.error(), answer.tokens.len()), (EngineError::Scores, 0));
        assert!(answer.error().to_string().contains("not finite"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_hears_of_a_stop() {
    let bench = Bench::start(EngineSettings { max_batch: 2, ..settings() }).await;
    let cold = bench.several(1).await.remove(0);
    let holding = bench.fault("holds stop").await;
    let mut running = bench.engine.submit(ask(None, 4, 400)).unwrap();
    running.recv().await.unwrap();
    let (latch, held) = bench.hold_with(&holding, "stop").await;
    // These lie in the inbox: the engine is inside a step.
    bench.store.shut();
    let waiting: Vec<_> =
        [None, Some(&cold), None].map(|adapter| bench.engine.submit(ask(adapter, 5, 5)).unwrap()).into();
    let engine = bench.engine.clone();
    let stopped = tokio::spawn(async move { engine.stop(Duration::ZERO).await });
    let behind = bench.engine.submit(ask(None, 5, 5));
    latch.open();
    stopped.await.unwrap();
    // Sent before or behind the stop, it hears of it.
    for receiver in waiting.into_iter().chain([running]).chain(behind) {
        assert_eq!(collect(receiver).await.error(), EngineError::Stopping);
    }
    // Its last token came with the step that was under way.
    collect(held).await.ok();
    let late = bench.engine.submit(ask(None, 5, 5)).err();
    assert_eq!(late, Some(EngineError::Stopping));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_may_end_within_the_grace() {
    let bench = Bench::start(settings()).await;
    let mut running = bench.engine.submit(ask(None, 4, 30)).unwrap();
    running.recv().await.unwrap();
    bench.engine.stop(Duration::from_secs(600)).await;
    assert_eq!(collect(running).await.end, Some(Ok(Finish::Length)));
    assert_eq!(bench.engine.submit(ask(None, 4, 3)).err(), Some(EngineError::Stopping));
}
