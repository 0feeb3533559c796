//! Adapters in memory: read once, within the budget, in order of arrival, and never in place of one another.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use attune::{
    domain::Site,
    inference::{AdapterRef, EngineError, EngineSettings, Finish, Lease, Request, WEIGHTS},
    methods::{self, AdapterFiles, MethodError},
    model::{At, Base, Hook, Linear},
    storage::{BlobStore, Key},
};
use candle_core::{Result, Tensor};
use serde_json::json;

use super::{Bench, ask, collect, run, settings, so_far};

/// Room for this many adapters like `one`, and a bit.
fn room_for(n: u64, one: &AdapterRef) -> EngineSettings {
    EngineSettings { adapter_budget_bytes: n * one.bytes + one.bytes / 2, ..settings() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_adapter_is_read_once_however_many_wait() {
    let bench = Bench::start(settings()).await;
    let adapter = bench.several(1).await.remove(0);
    let expected = {
        let engine = bench.engine(settings());
        run(&engine, ask(Some(&adapter), 7, 4)).await.ok()
    };
    let before = bench.store.reads_of(&adapter.generation);
    bench.store.shut();
    let receivers: Vec<_> = (0..20).map(|_| bench.engine.submit(ask(Some(&adapter), 7, 4)).unwrap()).collect();
    bench.until(|status| status.adapters == 1).await;
    bench.store.open();
    for receiver in receivers {
        assert_eq!(collect(receiver).await, expected);
    }
    let after = bench.store.reads_of(&adapter.generation);
    // Manifest, config and weights.
    let reads: Vec<usize> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    assert_eq!(reads, [1, 1, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_in_use_is_not_evicted_and_the_next_waits_for_its_end() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(2).await;
    let (a, b) = (&all[0], &all[1]);
    let mut expected = Vec::new();
    for adapter in &all {
        expected.push(run(&bench.engine, ask(Some(adapter), 7, 60)).await.ok());
    }
    let engine = bench.engine(room_for(1, a));
    let mut first = engine.submit(ask(Some(a), 7, 60)).unwrap();
    let token = first.recv().await.unwrap();
    let second = engine.submit(ask(Some(b), 7, 60)).unwrap();
    assert_eq!(collect(second).await, expected[1]);
    // B was not loaded before A had ended.
    let mut rest = so_far(&mut first);
    assert_eq!(rest.end, Some(Ok(Finish::Length)));
    rest.tokens.insert(
        0,
        match token {
            attune::inference::Output::Token { id, logprob } => (id, logprob),
            other => panic!("{other:?}"),
        },
    );
    assert_eq!(rest, expected[0]);
    assert_eq!(run(&engine, ask(Some(a), 7, 60)).await, expected[0], "back again after its eviction");
    assert_eq!(engine.status().adapters, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_least_recently_used_adapter_goes_first() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(3).await;
    let engine = bench.engine(room_for(2, &all[0]));
    // 0 and 1 come, 0 is used again, 2 takes the room of 1.
    for (i, reads) in [(0, 1), (1, 1), (0, 1), (2, 1), (0, 1), (1, 2)] {
        run(&engine, ask(Some(&all[i]), 3, 2)).await.ok();
        // The weights are read by nobody else; the manifest and config were read back when they were published.
        assert_eq!(bench.store.reads_of(&all[i].generation)[0] - 1, reads, "{i}");
    }
}

/// How many of these live, and the most that ever did.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counted(Lease);

impl Drop for Counted {
    fn drop(&mut self) {
        LIVE.fetch_sub(1, SeqCst);
    }
}

impl Hook for Counted {
    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        self.0.linear(at, site, x, base)
    }

    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, base: &Linear) -> Result<Tensor> {
        self.0.adjust(at, site, x, y, base)
    }
}

fn counted(files: &AdapterFiles, base: &Base) -> std::result::Result<Lease, MethodError> {
    let hook = methods::load(files, base)?;
    MOST.fetch_max(LIVE.fetch_add(1, SeqCst) + 1, SeqCst);
    Ok(Arc::new(Counted(hook)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_of_many_adapters_keeps_the_budget() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(6).await;
    // Both the batch and the line could hold more than there is room for.
    for max_batch in [1, 32] {
        let engine = bench.engine(EngineSettings { max_batch, loader: counted, ..room_for(2, &all[0]) });
        let receivers: Vec<_> = (0..18).map(|i| engine.submit(ask(Some(&all[i % 6]), 4, 6)).unwrap()).collect();
        for receiver in receivers {
            assert!(engine.status().adapter_bytes <= 2 * all[0].bytes + all[0].bytes / 2);
            collect(receiver).await.ok();
        }
        drop(engine);
        // Its thread lets go of the last adapters.
        let gone = async {
            while LIVE.load(SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await
            }
        };
        tokio::time::timeout(Duration::from_secs(60), gone).await.unwrap();
    }
    assert_eq!(MOST.load(SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_above_the_whole_budget_is_refused_unread() {
    let bench = Bench::start(settings()).await;
    let small = bench.several(1).await.remove(0);
    let large = bench.adapter("dense", json!({"type": "lora", "r": 16, "alpha": 6}), 3).await;
    let before = bench.store.reads_of(&large.generation);
    let engine = bench.engine(room_for(1, &small));
    let limit = room_for(1, &small).adapter_budget_bytes;
    let error = run(&engine, ask(Some(&large), 4, 4)).await.error();
    assert_eq!(error, EngineError::TooLarge { bytes: large.bytes, limit });
    assert!(error.to_string().contains(&large.bytes.to_string()) && error.to_string().contains(&limit.to_string()));
    assert_eq!(bench.store.reads_of(&large.generation), before);
    run(&engine, ask(Some(&small), 4, 4)).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_weights_are_an_error_and_never_the_base() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(4).await;
    let key = |adapter: &AdapterRef| Key::Adapter { generation: adapter.generation.clone(), name: WEIGHTS.to_owned() };
    let mut weights = bench.store.get(&key(&all[0])).await.unwrap().to_vec();
    let middle = weights.len() / 2;
    weights[middle] ^= 1;
    bench.store.put(&key(&all[0]), weights.into()).await.unwrap();
    bench.store.delete(&key(&all[1])).await.unwrap();
    let lying = AdapterRef { bytes: all[2].bytes - 1, ..all[2].clone() };
    let roomy = AdapterRef { virtual_tokens: 3, ..all[3].clone() };
    for (adapter, word) in [
        (&all[0], "damaged"),
        (&all[1], "not in the store"),
        (&lying, "as recorded"),
        (&roomy, "takes 0 places of the context, not 3 as recorded"),
    ] {
        for _ in 0..2 {
            let answer = run(&bench.engine, ask(Some(adapter), 4, 4)).await;
            let EngineError::Adapter(message) = answer.error() else { panic!("{answer:?}") };
            assert!(message.contains(word) && answer.tokens.is_empty(), "{answer:?}");
        }
    }
    // The second time nobody went to the store: published, read by this test, and read twice by the engine, since it
    // might have been damaged on its way.
    assert_eq!(bench.store.reads_of(&all[0].generation)[0], 4);
    run(&bench.engine, ask(None, 4, 4)).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_answers_on_its_own_base_only() {
    let bench = Bench::start(settings()).await;
    let adapter = bench.several(1).await.remove(0);
    let here = ask(Some(&adapter), 4, 4);
    let there = Request { base: "other".to_owned(), ..here.clone() };
    for _ in 0..2 {
        let answer = run(&bench.engine, there.clone()).await;
        let EngineError::Adapter(message) = answer.error() else { panic!("{answer:?}") };
        assert!(message.contains("another base than other"), "{message}");
        run(&bench.engine, here.clone()).await.ok();
    }
    let nowhere = run(&bench.engine, Request { base: "nowhere".to_owned(), ..here }).await.error();
    assert!(nowhere.to_string().contains("nowhere"), "{nowhere}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_adapter_stays_with_those_who_have_it() {
    let bench = Bench::start(settings()).await;
    let adapter = bench.several(1).await.remove(0);
    let expected = run(&bench.engine, ask(Some(&adapter), 7, 60)).await.ok();
    let (latch, held) = bench.hold("deleted").await;
    let receiver = bench.engine.submit(ask(Some(&adapter), 7, 60)).unwrap();
    latch.open();
    bench.until(|status| status.waiting == 0).await;
    bench.engine.evict(&adapter.generation);
    assert_eq!(bench.engine.residency().len(), 1, "the one that held the engine");
    assert_eq!(collect(receiver).await, expected);
    collect(held).await.ok();
    bench.until(|status| status.adapters == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_stuck_store_for_ever() {
    let patience = Duration::from_millis(200);
    let bench = Bench::start(EngineSettings { adapter_patience: patience, ..settings() }).await;
    let adapter = bench.several(1).await.remove(0);
    bench.store.shut();
    let waiting: Vec<_> = (0..3).map(|_| bench.engine.submit(ask(Some(&adapter), 4, 4)).unwrap()).collect();
    // The base goes on meanwhile.
    run(&bench.engine, ask(None, 4, 4)).await.ok();
    for receiver in waiting {
        assert_eq!(collect(receiver).await.error(), EngineError::Late(patience));
    }
    bench.until(|status| status.waiting == 0 && status.adapters == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_room_for_ever() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(2).await;
    let patience = Duration::from_millis(50);
    let one = EngineSettings { max_batch: 1, ..room_for(1, &all[0]) };
    let engine = bench.engine(EngineSettings { adapter_patience: patience, ..one });
    // One behind another they take far longer than the patience.
    let mut first: Vec<_> = (0..40).map(|_| engine.submit(ask(Some(&all[0]), 4, 500)).unwrap()).collect();
    first[0].recv().await.unwrap();
    let error = run(&engine, ask(Some(&all[1]), 4, 4)).await.error();
    assert_eq!(error, EngineError::Late(patience));
    let last = so_far(first.last_mut().unwrap());
    assert!(last.end.is_none(), "the test's first requests ended too early to take the room");
}
