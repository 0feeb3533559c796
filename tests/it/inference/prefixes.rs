//! What was read once is not read again, and nobody can tell but by the count.

use attune::{
    inference::{AdapterRef, EngineSettings, Handle, Output, Request},
    model::cache::PAGE,
};
use serde_json::json;
use tokio::sync::mpsc::Receiver;

use super::{Answer, Bench, ask, collect, settings};

/// How many of the prompt's tokens were not read, and the answer.
async fn asked(engine: &Handle, request: Request) -> (usize, Answer) {
    heard(engine.submit(request).unwrap()).await
}

async fn heard(mut receiver: Receiver<Output>) -> (usize, Answer) {
    let (mut reused, mut answer) = (0, Answer::default());
    while let Some(output) = receiver.recv().await {
        match output {
            Output::Reused(tokens) => reused = tokens,
            output => answer.take(output),
        }
    }
    (reused, answer.ok())
}

/// The same prompt up to `same`, and another rest.
fn varied(request: &Request, same: usize) -> Request {
    let mut other = request.clone();
    other.prompt[same..].iter_mut().for_each(|id| *id = (*id + 7) % 256);
    other
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_begins_alike_is_read_from_where_it_differs() {
    let bench = Bench::start(settings()).await;
    let specs = [
        None,
        Some(json!({"type": "lora", "r": 3, "alpha": 7})),
        Some(json!({"type": "ia3"})),
        Some(json!({"type": "prompt_tuning", "num_virtual_tokens": 5})),
        Some(json!({"type": "prompt_tuning", "num_virtual_tokens": 40})),
        Some(json!({"type": "prefix_tuning", "num_virtual_tokens": 9})),
        Some(json!({"type": "unipelt", "lora_r": 3, "prefix_length": 4, "bottleneck_size": 6})),
    ];
    for base in ["dense", "fast"] {
        for (seed, spec) in (1..).zip(&specs) {
            let adapter = match spec {
                Some(spec) => Some(bench.adapter(base, spec.clone(), seed).await),
                None => None,
            };
            let virtual_tokens = match spec {
                Some(spec) if spec["type"] == "prompt_tuning" => spec["num_virtual_tokens"].as_u64().unwrap() as usize,
                _ => 0,
            };
            let shared = |tokens: usize| ((tokens - 1 + virtual_tokens) / PAGE * PAGE).saturating_sub(virtual_tokens);
            let request = Request { base: base.to_owned(), ..ask(adapter.as_ref(), 100, 20) };
            let (none, first) = asked(&bench.engine, request.clone()).await;
            let (some, second) = asked(&bench.engine, request.clone()).await;
            assert_eq!((none, some), (0, shared(100)), "{spec:?}");
            assert_eq!(second, first, "{spec:?}");
            // Pieces and neighbours make no difference; what follows the text of an answer finds it too.
            let mut more = request.clone();
            more.prompt.extend(first.tokens.iter().map(|(id, _)| *id).chain([1, 2, 3]));
            for (request, reused) in [(varied(&request, 70), shared(71)), (more, shared(120))] {
                let (found, answer) = asked(&bench.engine, request.clone()).await;
                let fresh = bench.engine(EngineSettings { max_tokens_per_step: 11, ..settings() });
                assert_eq!((found, answer), (reused, asked(&fresh, request).await.1), "{spec:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_together_and_begins_alike_is_read_once() {
    for max_tokens_per_step in [512, 40] {
        let bench = Bench::start(EngineSettings { max_tokens_per_step, ..settings() }).await;
        let adapter = bench.adapter("dense", json!({"type": "lora", "r": 3, "alpha": 7}), 1).await;
        let request = ask(Some(&adapter), 100, 20);
        let requests = [request.clone(), varied(&request, 70), request.clone(), varied(&request, 20), request.clone()];
        asked(&bench.engine, ask(Some(&adapter), 5, 1)).await;
        let (latch, held) = bench.hold(&format!("{max_tokens_per_step} tokens")).await;
        let receivers: Vec<_> = requests.iter().map(|request| bench.engine.submit(request.clone()).unwrap()).collect();
        latch.open();
        collect(held).await.ok();
        let mut reused = Vec::new();
        for (receiver, request) in receivers.into_iter().zip(requests) {
            let (found, answer) = heard(receiver).await;
            assert_eq!(answer, asked(&bench.engine(settings()), request).await.1);
            reused.push(found);
        }
        assert_eq!(reused, [0, 64, 96, 0, 96]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_reads_what_another_adapter_or_project_wrote() {
    let bench = Bench::start(settings()).await;
    let adapters = bench.several(2).await;
    let of = |adapter: Option<&AdapterRef>, project: &str, base: &str| Request {
        project: project.to_owned(),
        base: base.to_owned(),
        ..ask(adapter, 80, 15)
    };
    let all = [
        of(Some(&adapters[0]), "a", "dense"),
        of(Some(&adapters[1]), "a", "dense"),
        of(None, "a", "dense"),
        of(None, "b", "dense"),
        of(None, "a", "other"),
        of(Some(&adapters[0]), "b", "dense"),
    ];
    for request in &all {
        let (reused, answer) = asked(&bench.engine, request.clone()).await;
        let alone = asked(&bench.engine(settings()), request.clone()).await.1;
        assert_eq!((reused, answer), (0, alone));
    }
    for request in &all {
        assert_eq!(asked(&bench.engine, request.clone()).await.0, 64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_every_row_reads_every_row() {
    let bench = Bench::start(settings()).await;
    asked(&bench.engine, ask(None, 90, 3)).await;
    let echo = Request { prompt_logprobs: Some(2), ..ask(None, 90, 3) };
    let (reused, answer) = asked(&bench.engine, echo).await;
    assert_eq!((reused, answer.prompt.len()), (0, 90));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_asked_for_longest_goes_first() {
    let bench = Bench::start(settings()).await;
    let page = bench.base("dense").new_cache().page_bytes();
    let engine = bench.engine(EngineSettings { kv_bytes: 8 * page, ..settings() });
    // Two full pages and a part of a third each.
    let prompt = |i: usize| ask(None, 65 + i, 2);
    for i in 0..12 {
        assert_eq!(asked(&engine, prompt(i)).await.0, 0);
        assert!(engine.status().kv_bytes <= 8 * page);
        // Asked for again and again, the first stays.
        assert_eq!(asked(&engine, prompt(0)).await.0, 64);
    }
    assert_eq!(asked(&engine, prompt(11)).await.0, 64);
    assert_eq!(asked(&engine, prompt(3)).await.0, 0);
}
