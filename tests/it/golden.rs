//! Against PEFT and torch: `tests/fixtures/golden/make.py` says how the numbers were made.

use std::{fs, path::PathBuf, sync::Arc};

use attune::{
    data::Example,
    methods::{self, AdapterFiles},
    model::{Base, Batch, Hook, Sequence},
    objectives::supervised,
};
use candle_core::{Tensor, safetensors};
use serde_json::{Value, json};

use crate::support::training::{From, finish, spec};

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(path)
}

fn read(path: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(path)).unwrap()).unwrap()
}

fn base() -> Arc<Base> {
    Base::open("golden", &fixture("base")).unwrap()
}

fn adapter(path: &str) -> AdapterFiles {
    let file = |name| fs::read(fixture(path).join(name)).unwrap();
    AdapterFiles { config: file("adapter_config.json"), weights: file("adapter_model.safetensors") }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// The batch's rows without their padding.
fn rows() -> Vec<Example> {
    let batch = read("batch.json");
    let table = |key: &str| -> Vec<Vec<i64>> { serde_json::from_value(batch[key].clone()).unwrap() };
    let rows = table("input_ids").into_iter().zip(table("labels")).zip(table("attention_mask")).zip(1..);
    rows.map(|(((ids, labels), mask), line)| {
        let length = mask.iter().sum::<i64>() as usize;
        Example {
            line,
            ids: ids[..length].iter().map(|id| *id as u32).collect(),
            labels: labels[..length].iter().map(|label| u32::try_from(*label).ok()).collect(),
        }
    })
    .collect()
}

/// Hidden rows of all rows, and their loss summed.
fn forward(base: &Base, rows: &[Example], hook: Option<Arc<dyn Hook>>) -> (Tensor, Tensor) {
    let sequences = rows.iter().map(|row| Sequence { tokens: &row.ids, hook: hook.clone(), cache: None }).collect();
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    let targets = supervised::targets(rows.iter().map(|row| row.labels.as_slice()));
    let loss = base.cross_entropy(&hidden, &targets, hook.as_deref()).unwrap().loss;
    (hidden, loss)
}

fn trained(rows: &[Example]) -> f64 {
    rows.iter().map(Example::trained).sum::<usize>() as f64
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    difference.max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn the_frozen_model_agrees() {
    let (base, rows, expected) = (base(), rows(), read("base_eval.json"));
    let (hidden, loss) = forward(&base, &rows, None);
    let loss = f64::from(loss.to_scalar::<f32>().unwrap()) / trained(&rows);
    assert!((loss - expected["loss"].as_f64().unwrap()).abs() < 1e-5, "{loss}");
    let last = hidden.narrow(0, rows[0].ids.len() - 1, 1).unwrap();
    let scores = base.logits(&last, None).unwrap().squeeze(0).unwrap().to_vec1::<f32>().unwrap();
    for (i, (got, expected)) in scores.iter().zip(numbers(&expected["logits_row0_last"])).enumerate() {
        assert!((f64::from(*got) - expected).abs() < 1e-5, "score {i}: {got} {expected}");
    }
}

#[test]
fn first_gradients_agree() {
    let (base, rows) = (base(), rows());
    let method = methods::resume(&adapter("lora_qv/adapter_init"), &base).unwrap();
    let (_, loss) = forward(&base, &rows, Some(method.hook(None).unwrap()));
    let found = loss.affine(1.0 / trained(&rows), 0.0).unwrap().backward().unwrap();
    let expected = safetensors::load(fixture("lora_qv/grads0.safetensors"), &candle_core::Device::Cpu).unwrap();
    assert_eq!(expected.len(), method.variables().len());
    for (name, variable) in method.variables() {
        let expected = &expected[&name.replace(".weight", ".default.weight")];
        let found = found.get(variable.as_tensor()).unwrap();
        assert!(largest_difference(found, expected) < 1e-6, "{name}");
    }
}

#[test]
fn twenty_steps_agree() {
    let (base, rows, trajectory) = (base(), rows(), read("lora_qv/traj.json"));
    let training = json!({"n_epochs": 20, "batch_size": 4, "learning_rate": 1e-3, "lr_scheduler": "constant",
                          "weight_decay": 0.01});
    let adapter_spec = json!({"type": "lora", "r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]});
    let spec = spec(&base, adapter_spec, training);
    let start = adapter("lora_qv/adapter_init");
    let (finished, recorder) = finish(&base, &spec, &rows, From { start: Some(&start), ..From::default() });
    for (name, found) in [("loss", recorder.losses()), ("grad_norm", recorder.norms())] {
        let expected = numbers(&trajectory[name]);
        assert_eq!(found.len(), expected.len());
        for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() < 5e-6, "{name} of step {}: {found} {expected}", step + 1);
        }
    }
    let expected = adapter("lora_qv/adapter_final");
    let tensors = |files: &AdapterFiles| safetensors::load_buffer(&files.weights, &candle_core::Device::Cpu).unwrap();
    let (found, expected) = (tensors(&finished), tensors(&expected));
    assert_eq!(found.len(), expected.len());
    for (name, expected) in expected {
        assert!(largest_difference(&found[&name], &expected) < 1e-5, "{name}");
    }
}

#[test]
fn a_stored_adapter_gives_pefts_scores() {
    let (base, rows) = (base(), rows());
    let hook = methods::load(&adapter("lora_qv/adapter_final"), &base).unwrap();
    let (hidden, _) = forward(&base, &rows, Some(hook.clone()));
    let found = base.logits(&hidden, Some(hook.as_ref())).unwrap();
    let expected = safetensors::load(fixture("lora_qv/eval_logits.safetensors"), &candle_core::Device::Cpu).unwrap();
    let mut start = 0;
    for (row, example) in rows.iter().enumerate() {
        let length = example.ids.len();
        let expected = expected["logits"].get(row).unwrap().narrow(0, 0, length).unwrap();
        let found = found.narrow(0, start, length).unwrap();
        assert!(largest_difference(&found, &expected) < 1e-5, "row {row}");
        start += length;
    }
}
