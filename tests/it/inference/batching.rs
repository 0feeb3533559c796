//! Batched is alone: the same tokens and the same log-probabilities, bit for bit.

use attune::{
    inference::{AdapterRef, EngineSettings, Finish, Output, Request, Sampling},
    model::{Batch, Sequence},
};
use serde_json::json;

use super::{Bench, ask, collect, run, settings};

/// Adapters of different ranks, strengths, targets and methods, and the base itself.
pub(super) async fn mixed(bench: &Bench, base: &str) -> Vec<Option<AdapterRef>> {
    let specs = [
        json!({"type": "lora", "r": 2, "alpha": 5}),
        json!({"type": "lora", "r": 5, "alpha": 3, "use_rslora": true}),
        json!({"type": "lora", "r": 8, "alpha": 11, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
        json!({"type": "prompt_tuning", "num_virtual_tokens": 5}),
        json!({"type": "prefix_tuning", "num_virtual_tokens": 9}),
        json!({"type": "p_tuning", "num_virtual_tokens": 3}),
        json!({"type": "dora", "r": 3, "alpha": 7}),
        json!({"type": "ia3"}),
        json!({"type": "unipelt", "lora_r": 3, "prefix_length": 4, "bottleneck_size": 6}),
        json!({"type": "moe_lora", "num_experts": 3, "r": 2, "alpha": 5}),
    ];
    let mut all = vec![None];
    for (seed, spec) in (1..).zip(specs) {
        all.push(Some(bench.adapter(base, spec, seed).await));
    }
    all
}

/// Uneven prompts, some greedy and some drawn, two of each adapter.
fn requests(base: &str, adapters: &[Option<AdapterRef>]) -> Vec<Request> {
    let sampled = |seed| Sampling { seed, top_p: 0.9, repetition_penalty: 1.2, ..Sampling::default() };
    let mut all = Vec::new();
    for (i, adapter) in adapters.iter().enumerate() {
        let greedy = ask(adapter.as_ref(), 1 + 23 * i, 12 + i);
        let drawn = Request { sampling: sampled(i as u64), ..ask(adapter.as_ref(), 40 - 3 * i, 18) };
        all.extend([greedy, Request { prompt_logprobs: Some(2), ..drawn }]);
    }
    all.into_iter().map(|request| Request { base: base.to_owned(), ..request }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_adapters_says_what_each_says_alone() {
    let bench = Bench::start(settings()).await;
    for base in ["dense", "quantised", "fast"] {
        let requests = requests(base, &mixed(&bench, base).await);
        let mut alone = Vec::new();
        for request in &requests {
            alone.push(run(&bench.engine, request.clone()).await.ok());
        }
        for (i, answer) in alone.iter().enumerate() {
            assert!(alone[..i].iter().all(|other| other.tokens != answer.tokens), "the adapters say the same");
        }
        // Small pieces, so that prompts are read over several steps beside those who speak already.
        for max_tokens_per_step in [512, 24, 7] {
            let engine = bench.engine(EngineSettings { max_tokens_per_step, ..settings() });
            let mut receivers = Vec::new();
            for (i, request) in requests.iter().enumerate() {
                let mut receiver = engine.submit(request.clone()).unwrap();
                // Every third one has begun to speak before the next arrives.
                let first = if i % 3 == 0 { receiver.recv().await } else { None };
                receivers.push((first, receiver));
            }
            for ((first, receiver), alone) in receivers.into_iter().zip(&alone) {
                let mut rest = super::collect(receiver).await;
                match first {
                    Some(Output::Token { id, logprob }) => rest.tokens.insert(0, (id, logprob)),
                    Some(Output::Prompt(found)) => rest.prompt = found,
                    other => assert!(other.is_none(), "{other:?}"),
                }
                assert_eq!(&rest, alone, "{base}, {max_tokens_per_step} tokens a step");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_is_one_forward_whatever_the_adapters() {
    let bench = Bench::start(settings()).await;
    let adapters = mixed(&bench, "dense").await;
    for adapter in &adapters {
        run(&bench.engine, ask(adapter.as_ref(), 3, 1)).await.ok();
    }
    let (latch, held) = bench.hold("one forward").await;
    let before = bench.base("dense").forward_count();
    let ask = |i: usize, adapter: &Option<AdapterRef>| bench.engine.submit(ask(adapter.as_ref(), 5 + i, 20)).unwrap();
    let receivers: Vec<_> = adapters.iter().enumerate().map(|(i, adapter)| ask(i, adapter)).collect();
    latch.open();
    collect(held).await.ok();
    for receiver in receivers {
        assert_eq!(collect(receiver).await.ok().tokens.len(), 20);
    }
    assert_eq!(bench.base("dense").forward_count() - before, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_scored_as_the_model_scores_it() {
    let bench = Bench::start(settings()).await;
    let base = bench.base("dense");
    let request = Request { prompt_logprobs: Some(2), ..ask(None, 30, 0) };
    let sequences = vec![Sequence { tokens: &request.prompt, branches: &[], hook: None, cache: None }];
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    let scores: Vec<Vec<f32>> = base.logits(&hidden, None).unwrap().to_vec2().unwrap();
    for max_tokens_per_step in [512, 4] {
        let engine = bench.engine(EngineSettings { max_tokens_per_step, ..settings() });
        let answer = run(&engine, request.clone()).await.ok();
        assert_eq!((answer.end, answer.tokens.len()), (Some(Ok(Finish::Length)), 0));
        assert_eq!(answer.prompt.len(), 30);
        assert!(answer.prompt[0].is_none());
        for ((found, scores), id) in answer.prompt[1..].iter().zip(&scores).zip(&request.prompt[1..]) {
            let found = found.as_ref().unwrap();
            let sum: f64 = scores.iter().map(|score| f64::from(*score).exp()).sum();
            let expected = |id: u32| f64::from(scores[id as usize]) - sum.ln();
            assert_eq!((found.id, found.top.len()), (*id, 2));
            assert!((f64::from(found.logprob) - expected(*id)).abs() < 1e-4, "{found:?}");
            assert!(scores.iter().all(|score| *score <= scores[found.top[0].0 as usize]));
            assert!((f64::from(found.top[1].1) - expected(found.top[1].0)).abs() < 1e-4, "{found:?}");
        }
    }
}
