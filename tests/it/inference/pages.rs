//! Keys and values in pages: within the budget, given back at once, and read again where they ran out.

use attune::{
    inference::{AdapterRef, EngineError, EngineSettings, Finish, Request},
    model::cache::PAGE,
};

use super::{Answer, Bench, ask, batching::mixed, collect, run, settings};
use crate::support::tiny::Random;

/// Room for so many pages of the tiny bases.
fn pages(bench: &Bench, n: usize) -> EngineSettings {
    EngineSettings { kv_bytes: n * bench.base("dense").new_cache().page_bytes(), ..settings() }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gave_pages_back_says_the_same() {
    let bench = Bench::start(settings()).await;
    let adapters = mixed(&bench, "dense").await;
    let request = |(i, adapter): (usize, &Option<AdapterRef>)| {
        let request = ask(adapter.as_ref(), 11 + 9 * i, 70 - 3 * i);
        Request { prompt_logprobs: (i % 3 == 0).then_some(1), ..request }
    };
    let requests: Vec<Request> = adapters.iter().enumerate().map(request).collect();
    let mut alone: Vec<Answer> = Vec::new();
    for request in &requests {
        alone.push(run(&bench.engine, request.clone()).await.ok());
    }
    // Each comes to three pages or four: several begin, and most have to give theirs back.
    for n in [5, 9] {
        let limit = pages(&bench, n);
        let bytes = limit.kv_bytes;
        let engine = bench.engine(EngineSettings { max_tokens_per_step: 40, ..limit });
        let receivers: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        let mut most = 0;
        for (receiver, alone) in receivers.into_iter().zip(&alone) {
            let mut answer = Answer::default();
            let mut receiver = receiver;
            while let Some(output) = receiver.recv().await {
                most = most.max(engine.status().kv_bytes);
                answer.take(output);
            }
            assert_eq!(&answer, alone, "{n} pages");
        }
        assert!(most > bytes / 2 && most <= bytes, "{most} of {bytes}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_fills_all_memory_ends_there() {
    let bench = Bench::start(settings()).await;
    let whole = run(&bench.engine, ask(None, 10, 200)).await.ok();
    let limit = pages(&bench, 2);
    let bytes = limit.kv_bytes;
    let engine = bench.engine(limit);
    let ended = run(&engine, ask(None, 10, 200)).await.ok();
    // The last token comes of the last row that has room.
    assert_eq!((ended.end, ended.tokens.len()), (Some(Ok(Finish::Length)), 2 * PAGE - 10 + 1));
    assert_eq!(ended.tokens, whole.tokens[..ended.tokens.len()]);
    let page = bytes / 2;
    let error = run(&engine, ask(None, 2 * PAGE + 1, 1)).await.error();
    assert_eq!(error, EngineError::Memory { bytes: 3 * page, limit: bytes });
    run(&engine, ask(None, 2 * PAGE, 1)).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_gives_its_pages_back() {
    let bench = Bench::start(settings()).await;
    let (latch, held) = bench.hold("pages").await;
    assert_eq!(bench.engine.status().kv_bytes, bench.base("dense").new_cache().page_bytes());
    drop(held);
    latch.open();
    bench.until(|status| status.kv_bytes == 0).await;
}

/// Many that come and go in every state: none leaves anything behind, and those that stay are not disturbed.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_cancellations_leaves_nothing() {
    let bench = Bench::start(settings()).await;
    let adapters = mixed(&bench, "dense").await;
    let stays = ask(adapters[1].as_ref(), 21, 150);
    let expected = run(&bench.engine, stays.clone()).await.ok();
    let engine =
        bench.engine(EngineSettings { max_batch: 8, max_tokens_per_step: 16, queue: 600, ..pages(&bench, 20) });
    let stays = engine.submit(stays).unwrap();
    let mut random = Random(8);
    let mut storm = Vec::new();
    for i in 0..400 {
        let request = ask(adapters[random.below(adapters.len())].as_ref(), 1 + random.below(28), 300);
        let mut receiver = engine.submit(Request { project: format!("p{}", i % 5), ..request }).unwrap();
        match random.below(3) {
            0 => drop(receiver),
            1 => storm.push(tokio::spawn(async move { drop(receiver.recv().await) })),
            _ => storm.push(tokio::spawn(async move {
                for _ in 0..4 {
                    receiver.recv().await;
                }
            })),
        }
    }
    for one in storm {
        one.await.unwrap();
    }
    assert_eq!(collect(stays).await, expected);
    while engine.status().running + engine.status().waiting > 0 {
        tokio::task::yield_now().await;
    }
    let page = bench.base("dense").new_cache().page_bytes();
    assert!(engine.status().kv_bytes <= 20 * page);
    assert_eq!(run(&engine, ask(adapters[1].as_ref(), 21, 150)).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_holds_nobody_up() {
    let bench = Bench::start(settings()).await;
    let slow = bench.engine.submit(ask(None, 9, 300)).unwrap();
    for i in 0..3 {
        run(&bench.engine, ask(None, 4 + i, 60)).await.ok();
    }
    // It ends without being read, and then it is all there.
    bench.until(|status| status.running == 0).await;
    assert_eq!(collect(slow).await.ok().tokens.len(), 300);
}
