//! Against PEFT and torch: `tests/fixtures/golden/make.py` says how the numbers were made. A new method is one row in
//! `cases`.

use std::{collections::HashMap, fs, path::PathBuf, sync::Arc};

use attune::{
    data::Example,
    domain::{Control, Snapshot, TrainSpec},
    methods::{self, AdapterFiles},
    model::{Base, Batch, Hook, Sequence},
    objectives::supervised,
    trainer::Outcome,
};
use candle_core::{Device, Tensor, safetensors};
use serde_json::{Value, json};

use crate::support::training::{From, Recorder, create, finish, run, spec};

/// A folder beside make.py, and the request that stands for its config.
struct Case {
    name: &'static str,
    adapter: Value,
    weight_decay: f64,
    /// How far the last values may be.
    limit: f32,
}

fn cases() -> Vec<Case> {
    let case = |name, adapter| Case { name, adapter, weight_decay: 0.01, limit: 1e-5 };
    vec![
        case("lora_qv", json!({"type": "lora", "r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]})),
        case("dora_all", json!({"type": "dora", "r": 4, "alpha": 8})),
        Case {
            weight_decay: 0.0,
            ..case(
                "loraplus",
                json!({"type": "lora", "r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"],
                       "loraplus_lr_ratio": 16}),
            )
        },
        case(
            "prompt_tuning",
            json!({"type": "prompt_tuning", "num_virtual_tokens": 5, "prompt_tuning_init": "RANDOM"}),
        ),
        case("prefix_tuning", json!({"type": "prefix_tuning", "num_virtual_tokens": 5, "init_weights": "random"})),
        case(
            "prefix_projection",
            json!({"type": "prefix_tuning", "num_virtual_tokens": 3, "prefix_projection": true,
                   "encoder_hidden_size": 40}),
        ),
        case("p_tuning_mlp", json!({"type": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 32})),
        case(
            "p_tuning_lstm",
            json!({"type": "p_tuning", "num_virtual_tokens": 7, "encoder_reparameterization_type": "LSTM",
                   "encoder_hidden_size": 10, "encoder_num_layers": 3}),
        ),
        case("ia3", json!({"type": "ia3"})),
        case("adalora", adalora()),
        // Adam makes much of the last bits of a gradient that is nearly zero, and some of sixty thousand are.
        Case { limit: 1e-3, ..case("full", json!({"type": "full"})) },
    ]
}

fn adalora() -> Value {
    json!({"type": "adalora", "init_r": 6, "target_r": 3, "tinit": 4, "tfinal": 5, "deltaT": 2, "alpha": 12,
           "orth_reg_weight": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]})
}

impl Case {
    fn file(&self, name: &str) -> PathBuf {
        fixture(self.name).join(name)
    }

    fn tensors(&self, name: &str) -> Tensors {
        safetensors::load(self.file(name), &Device::Cpu).unwrap()
    }

    fn trajectory(&self, name: &str) -> Vec<f64> {
        numbers(&read(&format!("{}/traj.json", self.name))[name])
    }

    fn adapter(&self, name: &str) -> AdapterFiles {
        let file = |part| fs::read(self.file(name).join(part)).unwrap();
        AdapterFiles { config: file("adapter_config.json"), weights: file("adapter_model.safetensors") }
    }

    /// Whether the file holds the product of an encoder, and not what is trained.
    fn is_encoded(&self) -> bool {
        self.file("encoder_init.safetensors").exists()
    }

    /// What is trained, as it begins.
    fn first(&self) -> Tensors {
        self.tensors(if self.is_encoded() {
            "encoder_init.safetensors"
        } else {
            "adapter_init/adapter_model.safetensors"
        })
    }

    fn spec(&self, base: &Base) -> TrainSpec {
        let rate = read(&format!("{}/traj.json", self.name))["lr"].clone();
        let training = json!({"n_epochs": 20, "batch_size": 4, "learning_rate": rate, "lr_scheduler": "constant",
                              "weight_decay": self.weight_decay});
        spec(base, self.adapter.clone(), training)
    }

    /// The checkpoint that a run begins with, with the fixture's values in it.
    fn first_snapshot(&self, base: &Arc<Base>, spec: &TrainSpec, rows: &[Example]) -> Snapshot {
        let mut recorder = Recorder { control: Some((1, Control::Cancel)), ..Recorder::default() };
        let outcome = run(base, spec, rows, From::default(), &mut recorder).unwrap();
        assert!(matches!(outcome, Outcome::Cancelled));
        let mut snapshot = recorder.snapshots.swap_remove(0);
        let mut tensors = trainer_tensors(&snapshot);
        for (name, value) in self.first() {
            assert!(tensors.insert(format!("w.{name}"), value).is_some(), "{name} is not trained");
        }
        let named = tensors.into_iter().map(|(name, tensor)| {
            (name, tensor.dims().to_vec(), tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        });
        snapshot.files[3].1 = methods::file::tensor_bytes(&named.collect::<Vec<_>>());
        snapshot
    }
}

type Tensors = HashMap<String, Tensor>;

/// Variables (`w.`), moments and state of a checkpoint.
fn trainer_tensors(snapshot: &Snapshot) -> Tensors {
    let (name, bytes) = &snapshot.files[3];
    assert_eq!(name, "trainer.safetensors");
    safetensors::load_buffer(bytes, &Device::Cpu).unwrap()
}

/// Our name of what PEFT names this way in memory.
fn of_peft(name: &str, ours: &Tensors) -> String {
    let name = name.strip_prefix("prompt_encoder.default.").map_or(name.replace(".default", ""), str::to_owned);
    match name.as_str() {
        // The trained rows themselves, without an encoder.
        "embedding.weight" if !ours.contains_key("embedding.weight") => "prompt_embeddings".to_owned(),
        // Files leave the last part out where the tensor is no module's weight.
        _ if ours.contains_key(&name) => name,
        _ => name.trim_end_matches(".weight").to_owned(),
    }
}

pub fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(path)
}

pub fn read(path: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(path)).unwrap()).unwrap()
}

pub fn base() -> Arc<Base> {
    Base::open("golden", &fixture("base")).unwrap()
}

pub fn adapter(path: &str) -> AdapterFiles {
    let file = |name| fs::read(fixture(path).join(name)).unwrap();
    AdapterFiles { config: file("adapter_config.json"), weights: file("adapter_model.safetensors") }
}

pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// The batch's rows without their padding.
pub fn rows() -> Vec<Example> {
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
pub fn forward(base: &Base, rows: &[Example], hook: Option<Arc<dyn Hook>>) -> (Tensor, Tensor) {
    let sequences =
        rows.iter().map(|row| Sequence { tokens: &row.ids, branches: &[], hook: hook.clone(), cache: None }).collect();
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    let targets = supervised::targets(rows.iter().map(|row| row.labels.as_slice()));
    let loss = base.cross_entropy(&hidden, &targets, hook.as_deref()).unwrap().loss;
    (hidden, loss)
}

pub fn trained(rows: &[Example]) -> f64 {
    rows.iter().map(Example::trained).sum::<usize>() as f64
}

pub fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
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
    for case in cases() {
        let (name, first) = (case.name, case.first());
        let method = create(&case.spec(&base).adapter, &base, 1);
        assert_eq!(method.variables().len(), first.len(), "{name}");
        for (variable, at) in method.variables() {
            at.set(&first[&variable]).unwrap();
        }
        let hook = method.hook(None).unwrap();
        let (_, loss) = forward(&base, &rows, Some(hook.clone()));
        let mut loss = loss.affine(1.0 / trained(&rows), 0.0).unwrap();
        if let Some(penalty) = hook.penalty().unwrap() {
            loss = (loss + penalty).unwrap();
        }
        let apart = f64::from(loss.to_scalar::<f32>().unwrap()) - case.trajectory("loss")[0];
        assert!(apart.abs() < 2e-6, "{name}: {apart}");

        let found = loss.backward().unwrap();
        let expected = case.tensors("grads0.safetensors");
        assert_eq!(expected.len(), first.len(), "{name}");
        let variables: HashMap<_, _> = method.variables().into_iter().collect();
        for (peft, expected) in expected {
            let variable = of_peft(&peft, &first);
            let found = found.get(variables[&variable].as_tensor()).unwrap();
            assert!(largest_difference(found, &expected) < 1e-6, "{name}: {variable}");
        }
    }
}

#[test]
fn twenty_steps_agree() {
    let (base, rows) = (base(), rows());
    for case in cases() {
        let (case_name, spec) = (case.name, case.spec(&base));
        // Not the files: they may hold an encoder's product, or an adapter whose ranks are decided.
        let first = case.first_snapshot(&base, &spec, &rows);
        let from = From { resume: Some(&first), ..From::default() };
        let (finished, recorder) = finish(&base, &spec, &rows, from);
        let penalties = recorder.metrics.iter().map(|metrics| metrics.figures.get("penalty").copied().unwrap_or(0.0));
        let losses: Vec<f64> = recorder.losses().iter().zip(penalties).map(|(loss, penalty)| loss + penalty).collect();
        for (name, found) in [("loss", losses), ("grad_norm", recorder.norms())] {
            let expected = case.trajectory(name);
            assert_eq!(found.len(), expected.len(), "{case_name}");
            for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
                let apart = (found - expected).abs();
                assert!(apart < 5e-6, "{case_name}: {name} of step {}: {found} {expected}", step + 1);
            }
        }
        let found = safetensors::load_buffer(&finished.weights, &Device::Cpu).unwrap();
        compare(&case, &found, &case.tensors("adapter_final/adapter_model.safetensors"));
        if case.is_encoded() {
            let weights = trainer_tensors(recorder.snapshots.last().unwrap()).into_iter();
            let weights = weights.filter_map(|(name, tensor)| Some((name.strip_prefix("w.")?.to_owned(), tensor)));
            compare(&case, &weights.collect(), &case.tensors("encoder_final.safetensors"));
        }
    }
}

/// After each step that prunes: a run's checkpoints hold the singular values, and those of pruned triplets are zero.
#[test]
fn adalora_prunes_what_peft_prunes() {
    let case = Case { name: "adalora", adapter: adalora(), weight_decay: 0.01, limit: 1e-5 };
    let (base, rows) = (base(), rows());
    let spec = case.spec(&base);
    let first = case.first_snapshot(&base, &spec, &rows);
    let (_, recorder) = finish(&base, &spec, &rows, From { resume: Some(&first), ..From::default() });
    let patterns = read("adalora/traj.json")["rank_patterns"].as_array().unwrap().clone();
    assert_eq!(patterns.len(), 20);
    for snapshot in &recorder.snapshots {
        let step = snapshot.step as usize - 1;
        let Some(pattern) = patterns[step].as_object() else { continue };
        // In between, pruned triplets are trained again; from step 15 on they stay away.
        if step % 2 == 1 && step < 15 {
            continue;
        }
        let tensors = trainer_tensors(snapshot);
        for (key, kept) in pattern {
            let e = &tensors[&format!("w.base_model.model.{}", key.trim_end_matches(".default"))];
            let e = e.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let found: Vec<bool> = e.iter().map(|e| *e != 0.0).collect();
            assert_eq!(json!(found), *kept, "step {step}: {key}");
        }
    }
    assert!((6..20).all(|step| patterns[step].is_object()));
}

#[track_caller]
fn compare(case: &Case, found: &Tensors, expected: &Tensors) {
    assert_eq!(found.len(), expected.len(), "{}", case.name);
    for (name, expected) in expected {
        let found = &found[name];
        let most = largest_difference(found, expected);
        assert!(most < case.limit, "{}: {name}: {most}", case.name);
        let square = (found - expected).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(square.sqrt() < 5e-5, "{}: {name}: {} on average", case.name, square.sqrt());
    }
}

#[test]
fn a_stored_adapter_gives_pefts_scores() {
    let (base, rows) = (base(), rows());
    let longest = rows.iter().map(|row| row.ids.len()).max().unwrap();
    for case in cases() {
        let hook = methods::load(&case.adapter("adapter_final"), &base).unwrap();
        let (hidden, _) = forward(&base, &rows, Some(hook.clone()));
        let found = base.logits(&hidden, Some(hook.as_ref())).unwrap();
        let expected = &case.tensors("eval_logits.safetensors")["logits"];
        // PEFT scores virtual tokens as well.
        let before = expected.dim(1).unwrap() - longest;
        let mut start = 0;
        for (row, example) in rows.iter().enumerate() {
            let length = example.ids.len();
            let expected = expected.get(row).unwrap().narrow(0, before, length).unwrap();
            let found = found.narrow(0, start, length).unwrap();
            assert!(largest_difference(&found, &expected) < 1e-5, "{}: row {row}", case.name);
            start += length;
        }
    }
}
