//! Merged weights give the adapter's scores, on dense, quantised, tied and untied bases; what cannot be merged says so.

use std::{fs, sync::Arc};

use attune::{
    domain::MethodSpec,
    formats::gguf::Gguf,
    methods::{self, AdapterFiles, merged},
    model::{
        Base, Batch, Hook, Sequence,
        gguf::{self, Outtype},
    },
};
use candle_core::{Device, Tensor, quantized::GgmlDType};
use serde_json::{Value, json};

use crate::support::{
    quantised,
    tiny::{Random, Tiny},
    training::{self, create},
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
    let spec = training::method(base, adapter);
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

pub fn scores(base: &Base, hook: Option<Arc<dyn Hook>>) -> Tensor {
    let sequences = vec![Sequence { tokens: &TOKENS, branches: &[], hook: hook.clone(), cache: None }];
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    base.logits(&hidden, hook.as_deref()).unwrap()
}

pub fn far(a: &Tensor, b: &Tensor) -> f32 {
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
    let mut adapters: Vec<Value> = MethodSpec::all().iter().map(|spec| json!({"type": spec.type_name()})).collect();
    adapters.extend(["mola", "loramoe", "adamole"].map(|variant| json!({"type": "moe_lora", "variant": variant})));
    for mut adapter in adapters.into_iter().filter(|adapter| adapter["type"] != "qlora") {
        if adapter["type"] == "xlora" {
            adapter["adapters"] = json!(["a", "b"]);
        }
        let is_mergeable = training::method(base, &adapter).card().mergeable;
        match merged::directory(&moved(&adapter, base), base) {
            Ok(_) => assert!(is_mergeable, "{adapter}"),
            Err(refusal) => {
                let refusal = refusal.to_string();
                assert!(!is_mergeable && refusal.contains("no change of the base's weights"), "{adapter}: {refusal}");
            }
        }
    }
}

/// A base in a file of llama.cpp's order, with a tokenizer.
fn file_base(dir: &std::path::Path) -> Arc<Base> {
    let path = dir.join("base.gguf");
    quantised::write(&Tiny::default(), &path, GgmlDType::Q4_1);
    Base::open("file", &path).unwrap()
}

#[test]
fn merged_gguf_files_are_read_back_as_the_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let base = file_base(dir.path());
    let rows = [
        (json!({"r": 3, "alpha": 7, "use_rslora": true, "rank_pattern": {"q_proj": 2}}), false),
        (json!({"type": "dora", "r": 3, "alpha": 7}), false),
        (json!({"type": "ia3"}), false),
        (json!({"r": 3, "alpha": 7, "target_modules": ["v_proj", "lm_head"]}), true),
        (json!({"r": 3, "alpha": 7, "target_modules": ["v_proj", "embed_tokens"]}), true),
    ];
    for (adapter, changes_ends) in &rows {
        let files = moved(adapter, &base);
        let expected = scores(&base, Some(methods::load(&files, &base).unwrap()));
        let alone = far(&scores(&base, None), &expected);
        for (outtype, limit) in [
            (Outtype::F32, 1e-5),
            (Outtype::F16, 5e-3),
            (Outtype::Bf16, 4e-2),
            (Outtype::Q8_0, 5e-2),
            // Four bits again: nearer to the adapter than the base is, and no more is promised.
            (Outtype::Base, alone),
        ] {
            let path = dir.path().join("merged.gguf");
            fs::write(&path, merged::gguf(&files, &base, outtype).unwrap()).unwrap();
            let merged = Base::open("merged", &path).unwrap();
            let apart = far(&scores(&merged, None), &expected);
            assert!(apart < limit, "{adapter} {outtype:?}: {apart}, the base {alone}");
            assert_eq!(merged.info.tied, !changes_ends, "{adapter} {outtype:?}");
            let (ours, theirs) = (Gguf::open(&path).unwrap(), Gguf::open(&dir.path().join("base.gguf")).unwrap());
            for (key, value) in theirs.metadata.iter().filter(|(key, _)| *key != "general.file_type") {
                assert_eq!(ours.metadata.get(key), Some(value), "{key}");
            }
        }
    }
}

#[test]
fn what_has_no_gguf_file_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let (file, folder) = (file_base(dir.path()), &bases()[0]);
    let lora = json!({"r": 3, "alpha": 7});
    let refusal = merged::gguf(&moved(&lora, folder), folder, Outtype::F16).unwrap_err().to_string();
    assert!(refusal.contains("read from a directory"), "{refusal}");
    for (adapter, part) in [
        (json!({"type": "dora", "r": 3, "alpha": 7}), "not a low-rank matrix"),
        (json!({"type": "ia3"}), "not a low-rank matrix"),
        (json!({"r": 3, "alpha": 7, "target_modules": ["v_proj", "lm_head"]}), "tied base"),
        (json!({"r": 3, "alpha": 7, "target_modules": ["v_proj", "embed_tokens"]}), "adapted embedding"),
        (json!({"r": 3, "alpha": 7, "modules_to_save": ["model.norm"]}), "saved modules"),
    ] {
        let refusal = methods::as_gguf(&moved(&adapter, &file), &file).unwrap_err().to_string();
        assert!(refusal.contains(part), "{adapter}: {refusal}");
    }
}

/// A and B as llama.cpp applies them: alpha over the rank of each pair, rows of q and k pair by pair.
#[test]
fn lora_in_llama_cpps_file_is_the_same_change() {
    let dir = tempfile::tempdir().unwrap();
    let base = file_base(dir.path());
    let adapter = json!({"r": 4, "alpha": 7, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}});
    let spec = MethodSpec::from_json(&adapter).unwrap();
    let MethodSpec::Lora(lora) = &spec else { panic!() };
    let files = moved(&adapter, &base);
    let written = Gguf::from_bytes(methods::as_gguf(&files, &base).unwrap()).unwrap();
    assert_eq!((written.str("general.type"), written.str("adapter.type")), (Some("adapter"), Some("lora")));
    assert_eq!(written.str("general.architecture"), Some("llama"));
    let alpha = written.f64("adapter.lora.alpha").unwrap();
    let stored = candle_core::safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
    let tensor = |name: &str| {
        let view = written.tensor(name).unwrap_or_else(|| panic!("{name}"));
        Tensor::from_vec(view.to_f32().unwrap(), view.shape, &Device::Cpu).unwrap()
    };
    for target in lora.targets(&base.info).unwrap() {
        let hf = format!("{}.weight", target.site.path(target.layer));
        let name = gguf::name(&hf, |_| true).unwrap();
        let (a, b) = (tensor(&format!("{name}.lora_a")), tensor(&format!("{name}.lora_b")));
        let found = b.matmul(&a).unwrap().affine(alpha / a.dim(0).unwrap() as f64, 0.0).unwrap();
        let module = format!("base_model.model.{}", target.site.path(target.layer));
        let of = |part: &str| stored[&format!("{module}.{part}.weight")].clone();
        let change = of("lora_B").matmul(&of("lora_A")).unwrap().affine(target.scale, 0.0).unwrap();
        let expected = base.gguf_rows(target.site, &change).unwrap();
        assert!(far(&found, &expected) < 1e-5, "{name}");
    }
    assert_eq!(written.tensor_names().count(), 2 * 7 * base.info.layers);
}
