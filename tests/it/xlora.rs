//! X-LoRA against PEFT: `tests/fixtures/xlora/make.py` says how the numbers were made.

use std::{collections::HashMap, fs, path::PathBuf, sync::Arc};

use attune::{
    data::Example,
    domain::{MethodSpec, TrainSpec},
    methods::{self, AdapterFiles},
    model::{Base, Batch, Hook, Sequence},
    objectives::supervised,
};
use candle_core::{Device, Tensor, safetensors};
use serde_json::{Value, json};

use crate::support::training::{From, finish, spec};

const CASES: [&str; 4] = ["dense", "layerwise", "topk", "trained"];

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

fn json_of(path: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(path)).unwrap()).unwrap()
}

fn tensors(path: &str) -> HashMap<String, Tensor> {
    safetensors::load(fixture(path), &Device::Cpu).unwrap()
}

fn base() -> Arc<Base> {
    Base::open("golden", &fixture("golden/base")).unwrap()
}

/// The files of PEFT's directory.
fn entries(case: &str) -> Vec<(String, Vec<u8>)> {
    let folder = fixture(&format!("xlora/{case}/adapter"));
    let folders = ["".to_owned()].into_iter().chain((0..3).map(|i| format!("{i}/")));
    let folders = folders.filter(|inner| folder.join(inner).join("adapter_config.json").exists());
    folders
        .flat_map(|inner| ["adapter_config.json", "adapter_model.safetensors"].map(|name| format!("{inner}{name}")))
        .map(|path| (path.clone(), fs::read(folder.join(path)).unwrap()))
        .collect()
}

fn adapter(case: &str) -> AdapterFiles {
    methods::of_directory(entries(case)).unwrap()
}

/// The golden batch without its padding.
fn rows() -> Vec<Example> {
    let batch = json_of("golden/batch.json");
    let table = |key: &str| -> Vec<Vec<i64>> { serde_json::from_value(batch[key].clone()).unwrap() };
    let (ids, labels, masks) = (table("input_ids"), table("labels"), table("attention_mask"));
    let row = |i: usize| {
        let length = masks[i].iter().sum::<i64>() as usize;
        let ids = ids[i][..length].iter().map(|id| *id as u32).collect();
        Example {
            line: i as u64 + 1,
            ids,
            labels: labels[i][..length].iter().map(|x| u32::try_from(*x).ok()).collect(),
        }
    };
    (0..ids.len()).map(row).collect()
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn hidden(base: &Base, rows: &[Example], hook: &Arc<dyn Hook>) -> Tensor {
    let sequence = |row| -> Sequence { Sequence { tokens: row, branches: &[], hook: Some(hook.clone()), cache: None } };
    let sequences = rows.iter().map(|row| sequence(row.ids.as_slice())).collect();
    base.forward(&mut Batch { sequences, train: None }).unwrap()
}

#[test]
fn scores_and_first_gradients_are_those_of_peft() {
    let (base, rows) = (base(), rows());
    for case in CASES {
        let files = adapter(case);
        let serving = methods::load(&files, &base).unwrap();
        let logits = base.logits(&hidden(&base, &rows, &serving), Some(serving.as_ref())).unwrap();
        let apart = largest(&(logits - &tensors(&format!("xlora/{case}/logits.safetensors"))["logits"]).unwrap());
        assert!(apart < 1e-5, "{case}: scores {apart}");

        let method = methods::resume(&files, &base).unwrap();
        let hook = method.hook(None).unwrap();
        let targets = supervised::targets(rows.iter().map(|row| row.labels.as_slice()));
        let loss = base.cross_entropy(&hidden(&base, &rows, &hook), &targets, Some(hook.as_ref())).unwrap().loss;
        let loss = loss.affine(1.0 / targets.len() as f64, 0.0).unwrap();
        let (gradients, expected) = (loss.backward().unwrap(), tensors(&format!("xlora/{case}/grads0.safetensors")));
        assert_eq!(method.variables().len(), expected.len(), "{case}");
        for (name, variable) in method.variables() {
            let found = gradients.get(variable.as_tensor()).unwrap_or_else(|| panic!("{case}: {name} has no gradient"));
            let apart = largest(&(found - &expected[&name]).unwrap());
            assert!(apart < 1e-6 + 1e-4 * largest(&expected[&name]), "{case}: {name} {apart}");
        }
        let shares: f64 = hook.figures().iter().map(|(_, share)| share).sum();
        assert!(case == "topk" || shares <= 1.0 + 1e-5, "{case}: {shares}");
        assert_eq!(hook.figures().len(), if ["dense", "trained"].contains(&case) { 2 } else { 3 });
    }
}

#[test]
fn twenty_steps_are_those_of_peft() {
    let base = base();
    for case in CASES {
        let (files, traj) = (adapter(case), json_of(&format!("xlora/{case}/traj.json")));
        let training = json!({"n_epochs": 20, "batch_size": 4, "learning_rate": 1e-2, "lr_scheduler": "constant",
                              "weight_decay": 0.01});
        let plain = spec(&base, json!({"type": "lora"}), training);
        let spec = TrainSpec { adapter: methods::continued(&files).unwrap(), ..plain };
        let MethodSpec::Xlora(knobs) = &spec.adapter else { panic!("{case} is {:?}", spec.adapter) };
        // The case without softmax has dropout off as well; the first has a depth of 1, where there is none.
        assert!(knobs.xlora_depth == 1 || knobs.xlora_dropout_p == 0.0);
        let (end, recorder) = finish(&base, &spec, &rows(), From { start: Some(&files), ..From::default() });
        let series = |name: &str| -> Vec<f64> { serde_json::from_value(traj[name].clone()).unwrap() };
        for (step, (found, expected)) in recorder.losses().into_iter().zip(series("loss")).enumerate() {
            assert!((found - expected).abs() < 1e-4, "{case}: loss of step {step} {found} {expected}");
        }
        for (step, (found, expected)) in recorder.norms().into_iter().zip(series("grad_norm")).enumerate() {
            assert!((found - expected).abs() < 1e-3 * expected, "{case}: norm of step {step} {found} {expected}");
        }
        let (end, start) = (
            safetensors::load_buffer(&end.weights, &Device::Cpu).unwrap(),
            safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap(),
        );
        let expected = tensors(&format!("xlora/{case}/final.safetensors"));
        for (name, found) in &end {
            // The experts are as they were, unless they are trained.
            let apart = largest(&(found - expected.get(name).unwrap_or(&start[name])).unwrap());
            assert!(
                apart < if expected.contains_key(name) { 1e-4 } else { f32::MIN_POSITIVE },
                "{case}: {name} {apart}"
            );
        }
        assert_eq!(end.len(), start.len());
    }
}

/// PEFT's directory comes out as it went in, and what is missing in one is named.
#[test]
fn directories_are_complete() {
    let base = base();
    for case in CASES {
        let files = adapter(case);
        let exported = methods::directory(methods::resume(&files, &base).unwrap().export().unwrap()).unwrap();
        let paths = |entries: &[(String, Vec<u8>)]| entries.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
        assert_eq!(paths(&exported), paths(&entries(case)));
        for ((path, ours), (_, theirs)) in exported.iter().zip(entries(case)) {
            if path.ends_with(".json") {
                let [ours, theirs]: [Value; 2] = [ours, &theirs].map(|bytes| serde_json::from_slice(bytes).unwrap());
                assert!(ours.get("experts").is_none());
                for key in ["adapters", "r", "lora_alpha", "peft_type", "xlora_depth", "top_k_lora", "hidden_size"] {
                    assert_eq!(ours.get(key), theirs.get(key), "{case} {path} {key}");
                }
                continue;
            }
            let [ours, theirs] = [ours, &theirs].map(|bytes| safetensors::load_buffer(bytes, &Device::Cpu).unwrap());
            assert_eq!(ours.len(), theirs.len(), "{case} {path}");
            for (name, ours) in ours {
                assert_eq!(largest(&(ours - &theirs[&name]).unwrap()), 0.0, "{case} {path} {name}");
            }
        }
        let again = methods::of_directory(exported.clone()).unwrap();
        assert_eq!(again, methods::resume(&again, &base).unwrap().export().unwrap(), "{case}: another adapter");

        let refusal = |entries: Vec<(String, Vec<u8>)>| {
            let loaded = methods::of_directory(entries).and_then(|files| methods::load(&files, &base));
            loaded.err().unwrap_or_else(|| panic!("{case} was taken")).to_string()
        };
        // As PEFT 0.21.2 saves it.
        let mut broken = entries(case);
        broken[1].1 = methods::file::tensor_bytes::<Vec<f32>>(&[]);
        assert!(refusal(broken).contains("internal_xlora_classifier.layers.0.weight is missing"));
        let without = entries(case).into_iter().filter(|(path, _)| !path.starts_with("1/")).collect();
        assert!(refusal(without).contains("no expert 1"));
    }
    let two =
        [entries("dense")[2].clone(), entries("dense")[3].clone()].map(|(path, bytes)| (path[2..].to_owned(), bytes));
    let more = [two.to_vec(), entries("dense")[4..].to_vec()].concat();
    assert!(methods::of_directory(more).unwrap_err().to_string().contains("there twice, at the top and in 1"));
}

/// Writes `target/xlora` for `make.py OUT check FOLDER`.
#[test]
#[ignore = "makes what make.py shows to PEFT"]
fn directories_for_peft() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/xlora");
    for case in CASES {
        for (path, bytes) in methods::directory(adapter(case)).unwrap() {
            let path = root.join(case).join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }
}
