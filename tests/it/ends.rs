//! The ends of the model: embedding and output layer as LoRA's targets, saved modules and trained tokens, against
//! PEFT on a tied base (`tests/fixtures/ends/make.py`).

use std::{collections::HashMap, fs, path::PathBuf, sync::Arc};

use attune::{
    domain::{MethodSpec, Site},
    methods::{self, AdapterFiles, MethodError},
    model::{Base, Batch, Hook, Sequence, Target, ops},
};
use candle_core::{Device, Tensor, safetensors};
use serde_json::{Value, json};

use crate::{
    golden::{base, forward, largest_difference, rows, trained},
    support::{
        tiny::{Random, Tiny, VOCAB},
        training::{self, From, create, finish, spec},
    },
};

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ends").join(path)
}

fn adapter(path: &str) -> AdapterFiles {
    let file = |name| fs::read(fixture(path).join(name)).unwrap();
    AdapterFiles { config: file("adapter_config.json"), weights: file("adapter_model.safetensors") }
}

/// A folder of the fixtures, and the request that stands for its config.
fn cases() -> Vec<(&'static str, Value)> {
    let with = |fields: Value| {
        let mut adapter = json!({"type": "lora", "r": 4, "alpha": 6, "target_modules": ["q_proj"]});
        fields.as_object().unwrap().iter().for_each(|(key, value)| adapter[key] = value.clone());
        adapter
    };
    vec![
        ("head", with(json!({"target_modules": ["q_proj", "lm_head"]}))),
        ("embed", with(json!({"target_modules": ["q_proj", "embed_tokens"]}))),
        ("dora_head", with(json!({"type": "dora", "target_modules": ["q_proj", "lm_head"]}))),
        ("saved", with(json!({"modules_to_save": ["lm_head", "model.norm", "input_layernorm"]}))),
        ("saved_embed", with(json!({"modules_to_save": ["embed_tokens"]}))),
        ("tokens", with(json!({"trainable_token_indices": [2, 33, 90]}))),
    ]
}

/// Our name of what PEFT names this way in memory.
fn of_peft(name: &str) -> String {
    let name = name.replace(".modules_to_save.default", "").replace(".default", "");
    name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
}

#[test]
fn losses_gradients_and_steps_are_pefts() {
    let (base, rows) = (base(), rows());
    for (name, request) in cases() {
        let losses: Vec<f64> = serde_json::from_slice(&fs::read(fixture(name).join("losses.json")).unwrap()).unwrap();
        let init = adapter(&format!("{name}/adapter_init"));
        let method = methods::resume(&init, &base).unwrap();
        let (_, loss) = forward(&base, &rows, Some(method.hook(None).unwrap()));
        let loss = loss.affine(1.0 / trained(&rows), 0.0).unwrap();
        assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - losses[0]).abs() < 2e-6, "{name}");
        let found = loss.backward().unwrap();
        let variables: HashMap<_, _> = method.variables().into_iter().collect();
        let expected = safetensors::load(fixture(name).join("grads0.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(expected.len(), variables.len(), "{name}");
        for (peft, expected) in expected {
            let ours = of_peft(&peft);
            let found = found.get(variables[&ours].as_tensor()).unwrap_or_else(|| panic!("{name}: {ours}"));
            assert!(largest_difference(found, &expected) < 1e-6, "{name}: {ours}");
        }

        let training = json!({"n_epochs": 8, "batch_size": 4, "learning_rate": 1e-3, "lr_scheduler": "constant",
                              "weight_decay": 0.01});
        let spec = spec(&base, request, training);
        let start = From { start: Some(&init), ..From::default() };
        let (finished, recorder) = finish(&base, &spec, &rows, start);
        for (step, (found, expected)) in recorder.losses().iter().zip(&losses).enumerate() {
            assert!((found - expected).abs() < 5e-6, "{name}, step {}: {found} {expected}", step + 1);
        }
        let tensors = |files: &AdapterFiles| safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
        let (ours, mut theirs) = (tensors(&finished), tensors(&adapter(&format!("{name}/adapter_final"))));
        theirs.retain(|name, _| !name.ends_with("base_layer.weight"));
        assert_eq!(ours.len(), theirs.len(), "{name}");
        for (tensor, expected) in theirs {
            assert!(largest_difference(&ours[&tensor], &expected) < 1e-5, "{name}: {tensor}");
        }
        // A fresh adapter trains the same tensors, and as many values as the request said.
        let fresh = create(&spec.adapter, &base, 1);
        let names =
            |method: &dyn methods::Trainable| method.variables().into_iter().map(|(n, _)| n).collect::<Vec<_>>();
        assert_eq!(names(fresh.as_ref()), names(method.as_ref()));
        let count: usize = fresh.variables().iter().map(|(_, variable)| variable.elem_count()).sum();
        assert_eq!(count as u64, spec.adapter.trainable(&base.info), "{name}");
        let (alone, with) = (forward(&base, &rows, None).0, fresh.hook(None).unwrap());
        let scores = |hidden: &Tensor, hook: Option<&dyn Hook>| base.logits(hidden, hook).unwrap();
        let hidden = forward(&base, &rows, Some(with.clone())).0;
        assert!(largest_difference(&scores(&hidden, Some(with.as_ref())), &scores(&alone, None)) < 1e-5, "{name}");
    }
}

#[test]
fn stored_adapters_give_pefts_scores() {
    let (base, rows) = (base(), rows());
    for (name, _) in cases() {
        let hook = methods::load(&adapter(&format!("{name}/adapter_final")), &base).unwrap();
        let (hidden, _) = forward(&base, &rows, Some(hook.clone()));
        let found = base.logits(&hidden, Some(hook.as_ref())).unwrap();
        let expected = safetensors::load(fixture(name).join("eval_logits.safetensors"), &Device::Cpu).unwrap();
        let mut start = 0;
        for (row, example) in rows.iter().enumerate() {
            let length = example.ids.len();
            let expected = expected["logits"].get(row).unwrap().narrow(0, 0, length).unwrap();
            let found = found.narrow(0, start, length).unwrap();
            assert!(largest_difference(&found, &expected) < 1e-5, "{name}, row {row}");
            start += length;
        }
    }
}

/// More rows than a chunk holds, against scores of all rows at once.
#[test]
fn chunks_change_no_loss_and_no_gradient() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    let base = Base::open("tiny", dir.path()).unwrap();
    for adapter in [
        json!({"r": 3, "alpha": 7, "target_modules": ["q_proj", "lm_head"]}),
        json!({"type": "dora", "r": 3, "alpha": 7, "target_modules": ["q_proj", "lm_head"]}),
        json!({"r": 3, "alpha": 7, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        json!({"r": 3, "alpha": 7, "target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 259]}),
        json!({"r": 3, "alpha": 7, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}),
    ] {
        let method = create(&MethodSpec::from_json(&adapter).unwrap(), &base, 2);
        for ((_, variable), seed) in method.variables().iter().zip(1..) {
            let mut random = Random(seed);
            let noise: Vec<f32> = (0..variable.elem_count()).map(|_| 0.1 * random.normal()).collect();
            let noise = Tensor::from_vec(noise, variable.shape(), &Device::Cpu).unwrap();
            variable.set(&(variable.as_tensor() + noise).unwrap()).unwrap();
        }
        let mut random = Random(9);
        let tokens: Vec<u32> = (0..300).map(|_| random.below(VOCAB) as u32).collect();
        let targets: Vec<Target> =
            (0..299).map(|row| Target { row, token: tokens[row + 1], weight: 0.5 + (row % 3) as f32 }).collect();
        let hook = method.hook(None).unwrap();
        let sequences = vec![Sequence { tokens: &tokens, branches: &[], hook: Some(hook.clone()), cache: None }];
        let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
        let ours = base.cross_entropy(&hidden, &targets, Some(hook.as_ref())).unwrap();
        let scores = base.logits(&hidden, Some(hook.as_ref())).unwrap();
        let (whole, correct) = ops::dense_cross_entropy(&scores, &targets).unwrap();
        assert_eq!(ours.correct, correct, "{adapter}");
        let value = |loss: &Tensor| loss.to_scalar::<f32>().unwrap();
        assert!((value(&ours.loss) / value(&whole) - 1.0).abs() < 1e-5, "{adapter}");
        let (found, expected) = (ours.loss.backward().unwrap(), whole.backward().unwrap());
        for (name, variable) in method.variables() {
            let (found, expected) = (found.get(&variable).unwrap(), expected.get(&variable).unwrap());
            let size = expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(size > 0.0 && largest_difference(found, expected) < 1e-4 * size.max(1.0), "{adapter}: {name}");
        }
    }
}

/// LoRA+ gives the embedding's matrices a rate of their own: Adam's first step is as long as the rate.
#[test]
fn the_embedding_learns_at_its_own_rate() {
    let (base, rows) = (base(), rows());
    let request = json!({"r": 4, "alpha": 6, "target_modules": ["q_proj", "embed_tokens"], "loraplus_lr_ratio": 5,
                         "loraplus_lr_embedding": 1e-4, "init_lora_weights": false});
    let training = json!({"max_steps": 1, "n_epochs": 1, "batch_size": 4, "learning_rate": 1e-3,
                          "lr_scheduler": "constant"});
    let spec = spec(&base, request, training);
    let before: HashMap<_, _> = create(&spec.adapter, &base, spec.seed).variables().into_iter().collect();
    let (finished, _) = finish(&base, &spec, &rows, From::default());
    for (name, after) in safetensors::load_buffer(&finished.weights, &Device::Cpu).unwrap() {
        let step = largest_difference(&after, before[&name].as_tensor());
        let expected = match name.rsplit_once(".lora_").unwrap().1 {
            "A.weight" => 1e-3,
            "B.weight" => 5e-3,
            _ => 1e-4,
        };
        assert!((step / expected - 1.0).abs() < 0.02, "{name}: {step}");
    }
}

/// The output layer's dropout: other losses than without, the same ones for the same pass.
#[test]
fn the_output_layer_drops_out_by_the_pass() {
    let (base, rows) = (base(), rows());
    let request =
        json!({"r": 4, "alpha": 6, "target_modules": ["lm_head"], "dropout": 0.5, "init_lora_weights": false});
    let method = create(&MethodSpec::from_json(&request).unwrap(), &base, 1);
    let loss = |key: Option<u64>| {
        let (_, loss) = forward(&base, &rows, Some(method.hook(key).unwrap()));
        loss.to_scalar::<f32>().unwrap()
    };
    assert_eq!(loss(Some(7)), loss(Some(7)));
    assert!(loss(Some(7)) != loss(Some(8)) && loss(Some(7)) != loss(None));
}

#[test]
fn files_of_other_ends_are_refused_by_name() {
    let base = base();
    let refusal = |files: &AdapterFiles| match methods::load(files, &base) {
        Err(error @ (MethodError::Mismatch(_) | MethodError::Unsupported(_))) => error.to_string(),
        Err(error) => panic!("{error:?}"),
        Ok(_) => panic!("the files were taken"),
    };
    let with = |case: &str, key: &str, value: Value| {
        let files = adapter(&format!("{case}/adapter_final"));
        let mut config: Value = serde_json::from_slice(&files.config).unwrap();
        config[key] = value;
        AdapterFiles { config: config.to_string().into_bytes(), ..files }
    };
    let refused = |case: &str, key: &str, value: Value| refusal(&with(case, key, value));
    assert!(refused("saved", "modules_to_save", json!(["lm_head", "embed_tokens"])).contains("embed_tokens"));
    assert!(refused("saved", "modules_to_save", json!(["lm_head"])).contains("layernorm.weight"));
    // PEFT's `norm` means every module whose name ends so: the tensors say which.
    let named = with("saved", "modules_to_save", json!(["lm_head", "norm"]));
    methods::load(&named, &base).unwrap();
    assert!(refused("tokens", "trainable_token_indices", json!([2, 33, 97])).contains("97"));
    assert!(refused("tokens", "trainable_token_indices", json!({"lm_head": [1]})).contains("lm_head"));
    methods::load(&with("tokens", "trainable_token_indices", json!({"embed_tokens": [2, 33, 90]})), &base).unwrap();
    assert!(refused("embed", "use_dora", json!(true)).contains("embed_tokens"));
    // Another base's output layer beside A and B.
    let files = adapter("head/adapter_final");
    let mut tensors = safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
    let copy = "base_model.model.lm_head.base_layer.weight";
    assert_eq!(tensors[copy].dims(), [base.info.vocab, base.linear(0, Site::Head).shape().1]);
    tensors.insert(copy.into(), (&tensors[copy] * 1.5).unwrap());
    let dir = tempfile::tempdir().unwrap();
    safetensors::save(&tensors, dir.path().join("a")).unwrap();
    let other = AdapterFiles { weights: fs::read(dir.path().join("a")).unwrap(), ..files };
    assert!(refusal(&other).contains(copy));
}

/// An adapter of the ends beside others: rows of a batch do not mix.
#[test]
fn rows_with_other_ends_do_not_mix() {
    let (base, rows) = (base(), training::rows(&[5, 9, 4], 3));
    let load = |case: &str| methods::load(&adapter(&format!("{case}/adapter_final")), &base).unwrap();
    let hooks: Vec<Option<Arc<dyn Hook>>> = vec![Some(load("saved")), None, Some(load("embed"))];
    let ids: Vec<Vec<u32>> = rows.iter().map(|row| row.ids.iter().map(|id| id % 97).collect()).collect();
    let sequences = |range: std::ops::Range<usize>| {
        let one = |i: usize| Sequence { tokens: &ids[i], branches: &[], hook: hooks[i].clone(), cache: None };
        range.map(one).collect::<Vec<_>>()
    };
    let hidden = |range: std::ops::Range<usize>| -> Vec<Vec<f32>> {
        base.forward(&mut Batch { sequences: sequences(range), train: None }).unwrap().to_vec2().unwrap()
    };
    let apart: Vec<Vec<f32>> = (0..3).flat_map(|i| hidden(i..i + 1)).collect();
    assert_eq!(hidden(0..3), apart);
}
