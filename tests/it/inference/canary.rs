//! Canaries: adapters of every method and rank, each of which sings its own song. Whatever the arrival, the batch and
//! the evictions, each says in a batch what it says alone: the same tokens, the same log-probabilities, bit for bit.

use std::time::Duration;

use attune::inference::{AdapterRef, DiskSettings, EngineSettings, Mix, Output, Request, Sampling};
use serde_json::{Value, json};

use super::{Answer, Bench, ask, run, settings};
use crate::support::tiny::Random;

fn specs() -> Vec<Value> {
    let mut all: Vec<Value> = [1, 2, 3, 7, 16].map(|r| json!({"type": "lora", "r": r, "alpha": r + 3})).into();
    all.extend([
        json!({"type": "lora", "r": 4, "alpha": 9, "use_rslora": true, "target_modules": ["v_proj", "up_proj"]}),
        json!({"type": "lora", "r": 2, "alpha": 3, "target_modules": ["q_proj", "lm_head"]}),
        json!({"type": "dora", "r": 3, "alpha": 5}),
        json!({"type": "adalora", "init_r": 4, "target_r": 2, "alpha": 3}),
        json!({"type": "ia3"}),
        json!({"type": "prompt_tuning", "num_virtual_tokens": 4}),
        json!({"type": "p_tuning", "num_virtual_tokens": 3}),
        json!({"type": "prefix_tuning", "num_virtual_tokens": 6}),
        json!({"type": "unipelt", "lora_r": 2, "prefix_length": 3}),
        json!({"type": "moe_lora", "variant": "mixlora", "num_experts": 3, "top_k": 2, "r": 2, "alpha": 3}),
        json!({"type": "moe_lora", "variant": "loramoe", "num_experts": 3, "r": 2, "alpha": 3}),
    ]);
    all
}

struct Canary {
    name: String,
    request: Request,
    alone: Answer,
}

async fn canaries(bench: &Bench, base: &str) -> Vec<Canary> {
    let mut adapters: Vec<(String, Option<AdapterRef>)> = vec![("the base".to_owned(), None)];
    for (seed, spec) in (60..).zip(specs()) {
        adapters.push((spec.to_string(), Some(bench.adapter(base, spec, seed).await)));
    }
    // And a mixture of the first two.
    let parts: Vec<AdapterRef> = adapters[1..3].iter().filter_map(|(_, adapter)| adapter.clone()).collect();
    let mix = Mix(vec![(parts[0].generation.clone(), 0.6), (parts[1].generation.clone(), 1.4)]);
    let bytes = parts.iter().map(|part| part.bytes).sum();
    adapters.push(("a mixture".to_owned(), Some(AdapterRef { generation: mix.to_string(), bytes, virtual_tokens: 0 })));
    let mut all = Vec::new();
    for (i, (name, adapter)) in adapters.into_iter().enumerate() {
        // The same prompt: only the adapter tells the answers apart.
        let sampling = Sampling { seed: i as u64, repetition_penalty: 1.1, ..Sampling::default() };
        let own = Request { base: base.to_owned(), ..ask(adapter.as_ref(), 11, 9 + i % 4) };
        let request = if i % 3 == 2 { Request { sampling, ..own } } else { own };
        let alone = run(&bench.engine, request.clone()).await.ok();
        all.push(Canary { name, request, alone });
    }
    for (i, canary) in all.iter().enumerate() {
        let same = all[..i].iter().find(|other| other.alone.tokens == canary.alone.tokens);
        assert!(same.is_none(), "{} sings like {}", canary.name, same.unwrap().name);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn every_canary_sings_its_own_song_in_any_crowd() {
    let bench = Bench::start(settings()).await;
    for base in ["dense", "fast"] {
        let all = canaries(&bench, base).await;
        let bytes = |canary: &Canary| canary.request.adapter.as_ref().map_or(0, |adapter| adapter.bytes);
        let (largest, total) = (all.iter().map(bytes).max().unwrap(), all.iter().map(bytes).sum::<u64>());
        for seed in 0..6 {
            let mut random = Random(900 + seed);
            let dir = tempfile::tempdir().unwrap();
            // From room for hardly more than one to room for all; with a disk and without.
            let disk = DiskSettings { dir: dir.path().to_owned(), budget: total / 3 };
            let engine = bench.engine(EngineSettings {
                max_batch: [2, 5, 32][random.below(3)],
                max_tokens_per_step: [5, 13, 512][random.below(3)],
                adapter_budget_bytes: [largest, largest + total / 4, 2 * total][random.below(3)],
                adapter_disk: (seed % 2 == 0).then_some(disk),
                adapter_patience: Duration::from_secs(120),
                ..settings()
            });
            let mut waiting = Vec::new();
            for _ in 0..40 {
                let canary = &all[random.below(all.len())];
                let project = format!("project {}", random.below(3));
                let is_background = random.below(5) == 0;
                let request = Request { project, is_background, ..canary.request.clone() };
                let mut receiver = engine.submit(request).unwrap();
                match random.below(8) {
                    // Goes away at once, or after its first token.
                    0 => continue,
                    1 => {
                        receiver.recv().await;
                        continue;
                    }
                    // Has spoken before the next comes.
                    2 => {
                        let Some(Output::Token { id, logprob }) = receiver.recv().await else { panic!("no token") };
                        waiting.push((canary, Some((id, logprob)), receiver));
                    }
                    3 => {
                        let generation = canary.request.adapter.as_ref().map(|adapter| adapter.generation.clone());
                        generation.iter().for_each(|generation| engine.evict(generation));
                        waiting.push((canary, None, receiver));
                    }
                    _ => waiting.push((canary, None, receiver)),
                }
            }
            for (canary, first, receiver) in waiting {
                let mut answer = super::collect(receiver).await;
                if let Some(first) = first {
                    answer.tokens.insert(0, first);
                }
                assert_eq!(answer, canary.alone, "{}, {base}, seed {seed}", canary.name);
            }
        }
    }
}
