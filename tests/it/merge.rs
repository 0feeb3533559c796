//! Merged weights give the adapter's scores, on dense, quantised, tied and untied bases; what cannot be merged says so.

use std::{fs, sync::Arc};

use attune::{
    domain::MethodSpec,
    methods::{self, AdapterFiles, merged},
    model::{Base, Batch, Hook, Sequence},
};
use candle_core::{Device, Tensor, quantized::GgmlDType};
use serde_json::{Value, json};

use crate::support::{
    quantised,
    tiny::{Random, Tiny},
    training::create,
};

const TOKENS: [u32; 9] = [7, 250, 33, 101, 5, 64, 64, 12, 199];

/// Tied and dense; tied and quantised; untied with biases.
fn bases() -> Vec<Arc<Base>> {
    let dir = tempfile::tempdir().unwrap();
    let (plain, biased) = (dir.path().join("plain"), dir.path().join("biased"));
    Tiny::default().write(&plain);
    Tiny { model_type: "qwen2", tied: false, ..Tiny::default() }.write(&biased);
    let gguf = dir.path().join("tiny.gguf");
    quantised::write(&Tiny::default(), &gguf, GgmlDType::Q4_1);
    let open = |name: &str, path: &std::path::Path| Base::open(name, path).unwrap();
    vec![open("dense", &plain), open("quantised", &gguf), open("biased", &biased)]
}

/// An adapter with every value moved.
fn moved(adapter: &Value, base: &Base) -> AdapterFiles {
    let spec = MethodSpec::from_json(adapter).unwrap();
    spec.check(&base.info).unwrap();
    let method = create(&spec, base, 2);
    for ((_, variable), seed) in method.variables().iter().zip(1..) {
        let mut random = Random(seed);
        let noise: Vec<f32> = (0..variable.elem_count()).map(|_| 0.1 * random.normal()).collect();
        let noise = Tensor::from_vec(noise, variable.shape(), &Device::Cpu).unwrap();
        variable.set(&(variable.as_tensor() + noise).unwrap()).unwrap();
    }
    method.export().unwrap()
}

fn scores(base: &Base, hook: Option<Arc<dyn Hook>>) -> Tensor {
    let sequences = vec![Sequence { tokens: &TOKENS, hook: hook.clone(), cache: None }];
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    base.logits(&hidden, hook.as_deref()).unwrap()
}

fn far(a: &Tensor, b: &Tensor) -> f32 {
    let most = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    most(&(a - b).unwrap()) / most(b)
}

#[test]
fn merged_scores_are_the_adapters() {
    let rows = [
        (json!({"r": 3, "alpha": 7, "use_rslora": true, "rank_pattern": {"q_proj": 2}}), false),
        (json!({"r": 3, "alpha": 7, "init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]}), false),
        (json!({"type": "dora", "r": 3, "alpha": 7}), false),
        (
            json!({"type": "ia3", "target_modules": "all-linear", "feedforward_modules": ["up_proj", "down_proj"]}),
            false,
        ),
        (json!({"type": "adalora", "init_r": 4, "target_r": 2, "alpha": 7}), false),
        (json!({"r": 3, "alpha": 7, "target_modules": ["v_proj", "lm_head"]}), true),
        (json!({"type": "dora", "r": 3, "alpha": 7, "target_modules": ["v_proj", "lm_head"]}), true),
        (json!({"r": 3, "alpha": 7, "target_modules": ["v_proj", "embed_tokens"]}), true),
        (json!({"r": 3, "alpha": 7, "modules_to_save": ["model.norm", "post_attention_layernorm"]}), false),
        (json!({"r": 3, "alpha": 7, "modules_to_save": ["embed_tokens"]}), true),
        (json!({"r": 3, "alpha": 7, "trainable_token_indices": [64, 250]}), true),
    ];
    for base in bases() {
        for (adapter, changes_ends) in &rows {
            let files = moved(adapter, &base);
            let dir = tempfile::tempdir().unwrap();
            for (name, bytes) in merged::directory(&files, &base).unwrap() {
                fs::write(dir.path().join(name), bytes).unwrap();
            }
            let merged = Base::open("merged", dir.path()).unwrap();
            let what = format!("{} {adapter}", base.info.id);
            assert_eq!(merged.info.storage, "F32", "{what}");
            assert_eq!(merged.info.tied, base.info.tied && !changes_ends, "{what}");
            let config: Value = serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
            assert_eq!(config["tie_word_embeddings"], json!(merged.info.tied), "{what}");
            let hook = methods::load(&files, &base).unwrap();
            let (expected, alone) = (scores(&base, Some(hook)), scores(&base, None));
            assert!(far(&scores(&merged, None), &expected) < 1e-5, "{what}");
            assert!(far(&alone, &expected) > 1e-3, "{what}: the adapter does nothing");
        }
    }
}

#[test]
fn what_is_no_change_of_weights_is_refused() {
    let base = &bases()[0];
    let files = moved(&json!({"type": "prompt_tuning", "num_virtual_tokens": 4}), base);
    let refusal = merged::directory(&files, base).unwrap_err().to_string();
    assert!(refusal.contains("no change of the base's weights"), "{refusal}");
}
