//! AdaLoRA's budget, its penalty, and the files of pruned adapters.

use std::{collections::BTreeMap, sync::Arc};

use attune::{
    methods::{self, AdapterFiles, MethodError, Stepped},
    model::{Base, Batch, Hook, Sequence},
};
use candle_core::{Device, Tensor, safetensors};
use serde_json::{Value, json};

use crate::support::{
    tiny::Tiny,
    training::{From, Recorder, create, finish, rows, spec},
};

fn base() -> Arc<Base> {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    Base::open("tiny", dir.path()).unwrap()
}

/// Few triplets for many modules, so that some modules end with none.
fn adapter() -> Value {
    json!({"type": "adalora", "init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 6, "deltaT": 3, "alpha": 7})
}

fn trained(base: &Arc<Base>) -> (AdapterFiles, Recorder) {
    let training = json!({"n_epochs": 20, "batch_size": 3, "learning_rate": 1e-2});
    finish(base, &spec(base, adapter(), training), &rows(&[9, 6, 12], 6), From::default())
}

fn hidden(base: &Base, hook: Arc<dyn Hook>) -> Vec<f32> {
    let tokens = [7, 250, 33, 101, 5, 64, 64, 12, 199];
    let sequences = vec![Sequence { tokens: &tokens, branches: &[], hook: Some(hook), cache: None }];
    base.forward(&mut Batch { sequences, train: None }).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// `rank_pattern` of the files.
fn pattern(files: &AdapterFiles) -> BTreeMap<String, Vec<bool>> {
    let config: Value = serde_json::from_slice(&files.config).unwrap();
    serde_json::from_value(config["rank_pattern"].clone()).unwrap()
}

#[test]
fn the_budget_falls_to_its_target_and_is_reported() {
    let base = base();
    let (files, recorder) = trained(&base);
    let ranks: Vec<f64> = recorder.metrics.iter().map(|metrics| metrics.figures["mean_rank"]).collect();
    // A step's figure is that of its passes: E is zero before the first update, whole after it, and the last pruning
    // is after step 14 of 0 to 19.
    assert_eq!((ranks[0], ranks[1], ranks[3]), (0.0, 4.0, 4.0));
    assert!(ranks[4] < 4.0 && ranks[4] > ranks[7], "{ranks:?}");
    // Between prunings a triplet may come back.
    assert!(ranks[5] > ranks[4], "{ranks:?}");
    assert!(ranks[15..].iter().all(|rank| *rank == 1.0), "{ranks:?}");
    let kept = pattern(&files);
    assert_eq!(kept.len(), 14);
    assert_eq!(kept.values().flatten().filter(|kept| **kept).count(), 14);
    assert!(kept.values().any(|kept| kept.iter().all(|kept| !kept)), "no module lost all: {kept:?}");
    let config: Value = serde_json::from_slice(&files.config).unwrap();
    assert_eq!((&config["total_step"], &config["tinit"], &config["tfinal"]), (&json!(20), &json!(2), &json!(6)));
}

#[test]
fn the_penalty_stands_apart_and_counts_once_a_step() {
    let (base, rows) = (base(), rows(&[17, 5, 9, 3], 3));
    let curve = |adapter: &Value, batch_size: u64| {
        let training = json!({"n_epochs": 4, "batch_size": batch_size, "grad_accumulation": 4 / batch_size,
                              "learning_rate": 1e-2, "validation_split": 0.0});
        let (_, recorder) = finish(&base, &spec(&base, adapter.clone(), training), &rows, From::default());
        let penalties: Vec<f64> = recorder.metrics.iter().map(|metrics| metrics.figures["penalty"]).collect();
        (recorder.losses(), recorder.norms(), penalties)
    };
    let adapter = json!({"type": "adalora", "init_r": 3, "target_r": 2, "orth_reg_weight": 0.4});
    let (losses, norms, penalties) = curve(&adapter, 4);
    // A, B of deviation 0.02 are far from orthonormal: both norms are near √3.
    assert!((penalties[0] - 0.4 * 3f64.sqrt()).abs() < 0.02, "{penalties:?}");
    assert!(penalties[3] < penalties[0] - 0.01, "{penalties:?}");
    let lora = json!({"type": "lora", "r": 3, "alpha": 7});
    let training = json!({"n_epochs": 1, "batch_size": 4, "learning_rate": 1e-2});
    let (_, plain) = finish(&base, &spec(&base, lora, training), &rows, From::default());
    assert_eq!(losses[0], plain.losses()[0]);
    let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    for batch_size in [1, 2] {
        let (l, n, p) = curve(&adapter, batch_size);
        assert!(close(&l, &losses) && close(&n, &norms) && close(&p, &penalties), "{p:?} {penalties:?}");
    }
    let without = json!({"type": "adalora", "init_r": 3, "target_r": 2, "orth_reg_weight": 0});
    let training = json!({"n_epochs": 2, "batch_size": 4});
    let (_, recorder) = finish(&base, &spec(&base, without, training), &rows, From::default());
    assert!(recorder.metrics.iter().all(|metrics| !metrics.figures.contains_key("penalty")));
}

#[test]
fn a_pruned_adapter_is_served_continued_and_folded() {
    let base = base();
    let (files, recorder) = trained(&base);
    let tensors = safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
    let kept = pattern(&files);
    for (key, kept) in &kept {
        let left = kept.iter().filter(|kept| **kept).count();
        let e = &tensors[&format!("base_model.model.{key}")];
        assert_eq!(e.dims(), [left, 1]);
        assert!(e.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|e| *e != 0.0));
        let of = |name: &str| &tensors[&format!("base_model.model.{}", key.replace("lora_E", name))];
        assert_eq!((of("lora_A").dims()[0], of("lora_B").dims()[1]), (left, left));
    }

    // The last checkpoint holds the whole matrices; what is served computes as they do.
    let snapshot = recorder.snapshots.last().unwrap();
    let whole = safetensors::load_buffer(&snapshot.files[3].1, &Device::Cpu).unwrap();
    let training = create(&spec(&base, adapter(), json!({})).adapter, &base, 1);
    for (name, variable) in training.variables() {
        variable.set(&whole[&format!("w.{name}")]).unwrap();
    }
    let expected = hidden(&base, training.hook(None).unwrap());
    let served = hidden(&base, methods::load(&files, &base).unwrap());
    assert!(apart(&served, &expected) < 1e-5);
    assert!(apart(&served, &hidden(&base, Arc::new(attune::model::Frozen))) > 1e-3);

    let folded = methods::as_lora(&files, &base.info).unwrap();
    assert_eq!(methods::spec_of(&folded).unwrap().type_name(), "lora");
    assert!(apart(&hidden(&base, methods::load(&folded, &base).unwrap()), &served) < 1e-5);
    assert_eq!(methods::as_lora(&folded, &base.info).unwrap(), folded);
    let count = safetensors::load_buffer(&folded.weights, &Device::Cpu).unwrap().len();
    assert_eq!(count, 2 * kept.values().filter(|kept| kept.contains(&true)).count());

    let resumed = methods::resume(&files, &base).unwrap();
    assert_eq!(resumed.export().unwrap(), files);
    let spec = spec(&base, adapter(), json!({"n_epochs": 9, "batch_size": 3, "learning_rate": 1e-2}));
    let rows = rows(&[9, 6, 12], 6);
    let (continued, again) = finish(&base, &spec, &rows, From { start: Some(&files), ..From::default() });
    assert_eq!(pattern(&continued), kept);
    let losses = again.losses();
    assert!(losses[0] < recorder.losses()[0] && losses[8] < losses[0], "{losses:?}");
    let middle = again.snapshots.iter().find(|snapshot| snapshot.step == 5).unwrap();
    let from = From { start: Some(&files), resume: Some(middle) };
    assert_eq!(finish(&base, &spec, &rows, from).0, continued);
}

#[test]
fn only_linear_changes_fold() {
    let base = base();
    let files = create(&spec(&base, json!({"type": "ia3"}), json!({})).adapter, &base, 1).export().unwrap();
    assert!(matches!(methods::as_lora(&files, &base.info), Err(MethodError::Unsupported(_))));
}

#[test]
fn state_of_another_shape_is_refused_by_name() {
    let base = base();
    let make = |adapter: Value| create(&spec(&base, adapter, json!({})).adapter, &base, 1);
    let mut method = make(adapter());
    let state = method.state();
    assert_eq!(state.len(), 2 * method.variables().len());
    let mut refusal = |state| method.restore(state).unwrap_err().to_string();
    let name = "importance.base_model.model.model.layers.0.self_attn.q_proj.lora_A";
    assert!(refusal(Vec::new()).contains(&format!("has no {name}")));
    let mut longer = state.clone();
    longer.push(("kept.more".into(), vec![1], vec![1.0]));
    assert!(refusal(longer).contains("has no kept.model.layers.0.self_attn.q_proj.lora_E"));
    let mut longer = state.clone();
    longer.push(("more".into(), vec![1], vec![1.0]));
    assert!(refusal(longer).contains("keeps no more"));
    let other = make(json!({"type": "adalora", "init_r": 5, "target_r": 1})).state();
    assert!(refusal(other).contains("has shape [5, 64], not [4, 64]"));
    method.restore(state).unwrap();
}

#[test]
fn files_with_another_rank_pattern_are_refused_by_name() {
    let base = base();
    let (files, _) = trained(&base);
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut config: Value = serde_json::from_slice(&files.config).unwrap();
        edit(&mut config);
        let files = AdapterFiles { config: config.to_string().into_bytes(), ..files.clone() };
        methods::load(&files, &base).map(|_| ()).unwrap_err().to_string()
    };
    let key = "model.layers.1.mlp.up_proj.lora_E";
    let text = edited(&|config| config["rank_pattern"][key] = json!([true]));
    assert!(text.contains(&format!("{key} lists 1 triplets, not init_r, 4")), "{text}");
    let text = edited(&|config| config["rank_pattern"]["model.layers.7.mlp.up_proj.lora_E"] = json!([true]));
    assert!(text.contains("model.layers.7.mlp.up_proj.lora_E is no target"), "{text}");
    let text = edited(&|config| config["rank_pattern"][key] = json!([true, true, true, true]));
    assert!(text.contains("up_proj.lora_A has shape"), "{text}");
    let text = edited(&|config| config["rank_pattern"] = Value::Null);
    assert!(text.contains("lora_A has shape"), "{text}");
    let text = edited(&|config| config["lora_alpha"] = json!(-3));
    assert!(text.contains("lora_alpha"), "{text}");
    let text = edited(&|config| config["init_r"] = json!(0));
    assert!(text.contains("init_r"), "{text}");
    for (key, value) in [
        ("use_rslora", json!(true)),
        ("alpha_pattern", json!({"q_proj": 3})),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("all")),
        ("task_type", json!("SEQ_2_SEQ_LM")),
        ("lora_bias", json!(true)),
        ("target_parameters", json!(["x"])),
    ] {
        let text = edited(&|config| config[key] = value.clone());
        assert!(text.contains(key), "{key}: {text}");
    }
}

/// The statistics see the weights after the step and the gradients that it used.
#[test]
fn a_triplet_without_gradient_goes_first() {
    let base = base();
    let adapter = json!({"type": "adalora", "init_r": 3, "target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 9,
                         "target_modules": ["1.mlp.up_proj"]});
    let mut method = create(&spec(&base, adapter, json!({})).adapter, &base, 1);
    let variables = method.variables();
    let mut gradients: Vec<Vec<f32>> = variables.iter().map(|(_, v)| vec![0.5; v.elem_count()]).collect();
    // The second triplet's vectors and value have none.
    let (inputs, r) = (64, 3);
    gradients[0][inputs..2 * inputs].fill(0.0);
    gradients[1][1] = 0.0;
    gradients[2].iter_mut().skip(1).step_by(r).for_each(|g| *g = 0.0);
    variables[1].1.set(&Tensor::new(&[[1f32], [9.0], [2.0]], &Device::Cpu).unwrap()).unwrap();
    let values = || variables[1].1.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for step in 0..19 {
        method.stepped(&Stepped { step, total_steps: 20, gradients: &gradients }).unwrap();
        let expected = if step < 9 { [1.0, 9.0, 2.0] } else { [1.0, 0.0, 2.0] };
        assert_eq!(values(), expected, "step {step}");
    }
    method.stepped(&Stepped { step: 19, total_steps: 20, gradients: &gradients }).unwrap();
    let files = method.export().unwrap();
    assert_eq!(pattern(&files)["model.layers.1.mlp.up_proj.lora_E"], [true, false, true]);
}
