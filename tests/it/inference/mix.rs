//! Mixtures of LoRAs: the weighted sum of their changes, and adapters like any other.

use attune::{
    domain::{MethodSpec, Site},
    inference::{AdapterRef, CONFIG, EngineError, EngineSettings, Mix, Request, WEIGHTS},
    methods::{self, AdapterFiles, mix::mix},
    model::{At, Hook},
    storage::{BlobStore, Key},
};
use candle_core::{DType, Device, Tensor};
use serde_json::json;

use super::{Bench, ask, collect, run, settings};
use crate::support::tiny::Random;

async fn files(bench: &Bench, adapter: &AdapterRef) -> AdapterFiles {
    let key = |name: &str| Key::Adapter { generation: adapter.generation.clone(), name: name.to_owned() };
    let config = bench.store.get(&key(CONFIG)).await.unwrap().to_vec();
    AdapterFiles { config, weights: bench.store.get(&key(WEIGHTS)).await.unwrap().to_vec() }
}

fn mixed(parts: &[(&AdapterRef, f32)]) -> AdapterRef {
    AdapterRef {
        generation: Mix(parts.iter().map(|(adapter, weight)| (adapter.generation.clone(), *weight)).collect())
            .to_string(),
        bytes: parts.iter().map(|(adapter, _)| adapter.bytes).sum(),
        virtual_tokens: 0,
    }
}

/// LoRAs of several ranks, strengths and targets, and one AdaLoRA.
async fn parts(bench: &Bench, base: &str) -> Vec<AdapterRef> {
    let specs = [
        json!({"type": "lora", "r": 3, "alpha": 7}),
        json!({"type": "lora", "r": 5, "alpha": 4, "use_rslora": true, "target_modules": ["q_proj", "down_proj"]}),
        json!({"type": "adalora", "init_r": 4, "target_r": 2, "alpha": 3}),
    ];
    let mut all = Vec::new();
    for (seed, spec) in (40..).zip(specs) {
        all.push(bench.adapter(base, spec, seed).await);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mixture_is_the_weighted_sum_of_changes() {
    let bench = Bench::start(settings()).await;
    let weights = [0.7f32, -1.3, 2.1];
    for (base, tolerance) in [("dense", 1e-5), ("quantised", 1e-5), ("fast", 2e-2)] {
        let parts = parts(&bench, base).await;
        let base = bench.base(base);
        let mut all = Vec::new();
        for (adapter, weight) in parts.iter().zip(weights) {
            all.push((files(&bench, adapter).await, weight));
        }
        let whole = mix(&all, base).unwrap();
        let single: Vec<_> = all.iter().map(|(files, _)| methods::load(files, base).unwrap()).collect();
        let mut random = Random(5);
        for layer in 0..base.info.layers {
            for site in Site::LAYER {
                let (outputs, inputs) = base.info.shape(site);
                let x: Vec<f32> = (0..3 * inputs).map(|_| random.normal()).collect();
                let x = Tensor::from_vec(x, (3, inputs), &Device::Cpu).unwrap();
                let at = At { layer, lengths: &[3], train: None };
                let delta = |hook: &dyn Hook| -> Vec<f32> {
                    let y = Tensor::zeros((3, outputs), DType::F32, &Device::Cpu).unwrap();
                    let y = hook.adjust(at, site, &x, y, base.linear(layer, site)).unwrap();
                    y.flatten_all().unwrap().to_vec1().unwrap()
                };
                let mut expected = vec![0f64; 3 * outputs];
                for (hook, weight) in single.iter().zip(weights) {
                    let change = delta(hook.as_ref());
                    expected.iter_mut().zip(&change).for_each(|(sum, x)| *sum += f64::from(weight) * f64::from(*x));
                }
                let size = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
                let found = delta(whole.as_ref());
                let apart = expected.iter().zip(&found).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum::<f64>().sqrt();
                assert!(size > 0.1 && apart <= tolerance * size, "{site:?} of {layer}: {apart} of {size}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mixture_is_batched_and_kept_like_any_adapter() {
    let bench = Bench::start(settings()).await;
    let parts = parts(&bench, "dense").await;
    let (a, b, c) = (&parts[0], &parts[1], &parts[2]);
    let adapters = [
        Some(a.clone()),
        Some(mixed(&[(a, 1.0)])),
        Some(mixed(&[(a, 0.5), (b, 0.5)])),
        Some(mixed(&[(a, 0.5), (b, -0.5)])),
        Some(mixed(&[(a, 0.25), (b, 0.5), (c, 1.5)])),
        None,
    ];
    let requests: Vec<Request> = adapters.iter().map(|adapter| ask(adapter.as_ref(), 9, 12)).collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(run(&bench.engine, request.clone()).await.ok());
    }
    // With weight 1 it is the adapter itself, up to the rounding of its scale.
    for (one, same) in alone[0].tokens.iter().zip(&alone[1].tokens) {
        let logprob = |token: &(u32, Option<attune::inference::TokenLogprob>)| token.1.as_ref().unwrap().logprob;
        assert!(one.0 == same.0 && (logprob(one) - logprob(same)).abs() < 1e-4);
    }
    for (i, answer) in alone.iter().enumerate().skip(1) {
        assert!(alone[i + 1..].iter().all(|other| other.tokens != answer.tokens), "{i}");
    }
    // Together, in room for three of them.
    let engine = bench.engine(EngineSettings { adapter_budget_bytes: 4 * a.bytes, ..settings() });
    for _ in 0..2 {
        let receivers: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        for (receiver, alone) in receivers.into_iter().zip(&alone) {
            assert_eq!(&collect(receiver).await, alone);
        }
        assert!(engine.status().adapter_bytes <= 4 * a.bytes);
    }
    // Who deletes one of its parts takes the mixture from memory.
    run(&bench.engine, requests[3].clone()).await.ok();
    let held = |generation: &str| bench.engine.residency().iter().any(|found| found.generation == generation);
    let name = &adapters[3].as_ref().unwrap().generation;
    assert!(held(name));
    bench.engine.evict(&b.generation);
    assert!(!held(name) && held(&a.generation));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_mixed_is_refused_by_name() {
    let bench = Bench::start(settings()).await;
    let lora = bench.several(1).await.remove(0);
    for (spec, word) in [
        (json!({"type": "dora", "r": 2, "alpha": 3}), "method dora"),
        (json!({"type": "ia3"}), "method ia3"),
        (json!({"type": "lora", "r": 2, "alpha": 3, "modules_to_save": ["lm_head"]}), "more than linears"),
    ] {
        assert!(MethodSpec::from_json(&spec).is_ok());
        let other = bench.adapter("dense", spec, 3).await;
        let mixture = mixed(&[(&lora, 0.5), (&other, 0.5)]);
        let error = run(&bench.engine, ask(Some(&mixture), 4, 4)).await.error();
        let EngineError::Adapter(why) = &error else { panic!("{error}") };
        assert!(why.contains(word) && why.contains("cannot be mixed"), "{why}");
    }
}
