//! Heads of texts and of tokens: against PEFT (`tests/fixtures/heads/make.py`), and through the loop.

use std::{cell::RefCell, collections::HashMap, fs, path::PathBuf, sync::Arc};

use attune::{
    data::{Example, Mark, Marked, Row},
    domain::{Control, ObjectiveSpec, TaskHead, TrainSpec, WordToken},
    methods::{self, AdapterFiles},
    model::{Base, Batch, Keep, Sequence, Tape},
    objectives::{self, Models},
    trainer::{Outcome, TrainError},
};
use candle_core::{Device, Tensor, safetensors};
use serde_json::{Value, json};

use crate::{
    golden::{base, largest_difference},
    support::training::{From, Recorder, finish, run, spec},
};

const TEXTS: [&str; 3] = ["bad", "good", "so so"];
const TAGS: [&str; 4] = ["O", "B-PER", "I-PER", "B-LOC"];

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/heads").join(path)
}

fn json_of(path: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(path)).unwrap()).unwrap()
}

/// An adapter of PEFT's; with the labels' names, as we write them.
fn adapter(path: &str, labels: &[&str]) -> AdapterFiles {
    let mut config = json_of(&format!("{path}/adapter_config.json"));
    config["id2label"] = labels.iter().enumerate().map(|(i, label)| (i.to_string(), json!(label))).collect();
    let weights = fs::read(fixture(path).join("adapter_model.safetensors")).unwrap();
    AdapterFiles { config: serde_json::to_vec(&config).unwrap(), weights }
}

/// A case, what trains it, and the adapter that a request would ask for.
fn cases() -> Vec<(&'static str, Value)> {
    let lora = json!({"type": "lora", "r": 3, "alpha": 7, "target_modules": ["q_proj", "down_proj"]});
    vec![
        ("sequence_lora", lora.clone()),
        ("sequence_ia3", json!({"type": "ia3"})),
        ("sequence_prompt", json!({"type": "prompt_tuning", "num_virtual_tokens": 4})),
        ("token_lora", lora),
        ("token_prefix", json!({"type": "prefix_tuning", "num_virtual_tokens": 3})),
    ]
}

fn labels(case: &str) -> &'static [&'static str] {
    if case.starts_with("token") { &TAGS } else { &TEXTS }
}

fn objective(case: &str) -> ObjectiveSpec {
    let name = if case.starts_with("token") { "token_classification" } else { "sequence_classification" };
    let mut knobs = json!({"labels": labels(case)});
    if case.starts_with("token") {
        // Every word of the fixtures is one token; PEFT's files do not say which token of a word is meant.
        knobs["word_token"] = json!("first");
    }
    ObjectiveSpec::from_json(&json!({"type": name, name: {"hyperparameters": knobs}})).unwrap()
}

/// The rows that PEFT was given.
fn rows(case: &str) -> Vec<Row> {
    let labels = labels(case);
    let table = json_of("rows.json");
    let row = |(row, line): (&Value, u64)| {
        let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
        let text = Example { line, labels: vec![None; ids.len()], ids };
        if !case.starts_with("token") {
            let label = labels[row["label"].as_u64().unwrap() as usize].to_owned();
            let marks = vec![Mark { tokens: 0..text.ids.len(), label }];
            return Row::Labelled(Marked { text, marks });
        }
        let tags = row["tags"].as_array().unwrap().iter().enumerate();
        let mark = |(place, tag): (usize, &Value)| {
            let label = labels[usize::try_from(tag.as_i64().unwrap()).ok()?].to_owned();
            Some(Mark { tokens: place..place + 1, label })
        };
        Row::Tagged(Marked { text, marks: tags.filter_map(mark).collect() })
    };
    table.as_array().unwrap().iter().zip(1..).map(row).collect()
}

fn task(base: &Base, case: &str, adapter: Value, training: Value) -> TrainSpec {
    TrainSpec { objective: objective(case), ..spec(base, adapter, training) }
}

/// Our name of what PEFT names this way in memory.
fn of_peft(name: &str) -> String {
    let name = name.replace(".modules_to_save.default", "").replace(".default", "");
    match name.as_str() {
        "prompt_encoder.embedding.weight" => "prompt_embeddings".to_owned(),
        _ => name,
    }
}

#[test]
fn losses_gradients_and_steps_are_pefts() {
    let base = base();
    for (case, request) in cases() {
        let losses: Vec<f64> = serde_json::from_value(json_of(&format!("{case}/losses.json"))).unwrap();
        let (init, rows) = (adapter(&format!("{case}/adapter_init"), labels(case)), rows(case));
        let method = methods::resume(&init, &base).unwrap();
        let refs: Vec<&Row> = rows.iter().collect();
        let tape = RefCell::new(Tape::new(Keep::Everything));
        let models =
            Models { base: &base, method: method.as_ref(), reference: None, train: None, tape: &tape, limit: 64 };
        let spec = objective(case);
        let objective = objectives::of(&spec);
        let found = objective.pass(&models, &refs).unwrap();
        let units = objective.counts(&refs)[0];
        let loss = found.terms[0].value / units;
        assert!((loss - losses[0]).abs() < 2e-6, "{case}: {loss}, not {}", losses[0]);
        let grads = found.terms[0].gradient.affine(1.0 / units, 0.0).unwrap().backward().unwrap();
        let variables: HashMap<_, _> = method.variables().into_iter().collect();
        let expected = safetensors::load(fixture(case).join("grads0.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(expected.len(), variables.len(), "{case}");
        for (peft, expected) in expected {
            let ours = of_peft(&peft);
            let variable = variables.get(&ours).unwrap_or_else(|| panic!("{case}: no {ours}"));
            let found = grads.get(variable.as_tensor()).unwrap_or_else(|| panic!("{case}: {ours}"));
            assert!(largest_difference(&found.reshape(expected.shape()).unwrap(), &expected) < 2e-6, "{case}: {ours}");
        }

        let training = json!({"n_epochs": 6, "batch_size": rows.len(), "learning_rate": 1e-2,
                              "lr_scheduler": "constant", "weight_decay": 0.01});
        let task = task(&base, case, request, training);
        let (last, recorder) = finish(&base, &task, &rows, From { start: Some(&init), ..From::default() });
        for (found, expected) in recorder.losses().iter().zip(&losses) {
            assert!((found - expected).abs() < 2e-4, "{case}: {:?} {losses:?}", recorder.losses());
        }
        let figures = &recorder.metrics[5].figures;
        assert_eq!(Some(figures["accuracy"]), recorder.metrics[5].train_mean_token_accuracy, "{case}");
        assert!(figures["f1"] > 0.0 && figures["f1"] <= 1.0, "{case}: {figures:?}");

        let there = adapter(&format!("{case}/adapter_final"), labels(case));
        let tensors = |files: &AdapterFiles| safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
        let (ours, theirs) = (tensors(&last), tensors(&there));
        for (name, expected) in &theirs {
            let found = ours.get(name).unwrap_or_else(|| panic!("{case}: {name} is missing"));
            assert!(largest_difference(found, expected) < 2e-4, "{case}: {name}");
        }
        assert_eq!(ours.len(), theirs.len(), "{case}");
    }
}

#[test]
fn scores_of_pefts_files_are_pefts() {
    let base = base();
    for (case, _) in cases() {
        let path = format!("{case}/adapter_final");
        let hook = methods::load(&adapter(&path, labels(case)), &base).unwrap();
        let expected = safetensors::load(fixture(case).join("eval_logits.safetensors"), &Device::Cpu).unwrap();
        for (i, row) in rows(case).iter().enumerate() {
            let text = row.examples().next().unwrap();
            let sequences = vec![Sequence { tokens: &text.ids, branches: &[], hook: Some(hook.clone()), cache: None }];
            let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
            let scores = base.logits(&hidden, Some(hook.as_ref())).unwrap();
            let expected = &expected[&i.to_string()];
            let found = scores.narrow(0, scores.dim(0).unwrap() - expected.dim(0).unwrap(), expected.dim(0).unwrap());
            assert!(largest_difference(&found.unwrap(), expected) < 1e-5, "{case}: row {i}");
        }
        // PEFT's own file says no names: Hugging Face's stand in.
        let weights = fs::read(fixture(&path).join("adapter_model.safetensors")).unwrap();
        let files = AdapterFiles { config: fs::read(fixture(&path).join("adapter_config.json")).unwrap(), weights };
        let head = methods::score::head(&files).unwrap().unwrap();
        assert_eq!(head.labels()[..2], ["LABEL_0", "LABEL_1"]);
        match head {
            TaskHead::Token { word_token, .. } => {
                assert_eq!((word_token, case.starts_with("token")), (WordToken::First, true))
            }
            head => assert!(matches!(head, TaskHead::Sequence { .. }) && case.starts_with("sequence")),
        }
    }
}

/// What we write: PEFT's names and keys, and the labels.
#[test]
fn the_files_are_pefts() {
    let base = base();
    for (case, request) in cases() {
        let task = task(&base, case, request, json!({"n_epochs": 1, "batch_size": 2}));
        let (files, _) = finish(&base, &task, &rows(case), From::default());
        let config: Value = serde_json::from_slice(&files.config).unwrap();
        let theirs = json_of(&format!("{case}/adapter_init/adapter_config.json"));
        assert_eq!(
            (&config["task_type"], &config["modules_to_save"]),
            (&theirs["task_type"], &json!(["classifier", "score"]))
        );
        assert_eq!(config["id2label"]["1"], labels(case)[1]);
        assert_eq!(methods::score::head(&files).unwrap(), task.objective.head());
        assert_eq!(methods::resume(&files, &base).unwrap().export().unwrap(), files, "{case}");
    }
}

#[test]
fn a_stopped_run_goes_on_as_if_it_had_not_been() {
    let base = base();
    for (case, request) in cases() {
        let rows = rows(case);
        let training = json!({"n_epochs": 3, "batch_size": 2, "grad_accumulation": 1, "learning_rate": 1e-2,
                              "checkpoint_every": 1, "validation_split": 0.3});
        let task = task(&base, case, request, training);
        let (adapter, whole) = finish(&base, &task, &rows, From::default());
        let last = whole.metrics.last().unwrap();
        assert!(last.figures.contains_key("eval_accuracy") && last.figures.contains_key("eval_f1"), "{last:?}");
        let mut recorder = Recorder { control: Some((2, Control::Drain)), ..Recorder::default() };
        assert!(matches!(run(&base, &task, &rows, From::default(), &mut recorder).unwrap(), Outcome::Drained));
        let snapshot = recorder.snapshots.last().unwrap();
        let (resumed, rest) = finish(&base, &task, &rows, From { resume: Some(snapshot), ..From::default() });
        assert!(resumed == adapter, "{case}: another adapter");
        assert_eq!(rest.losses(), whole.losses()[2..], "{case}");
        // Other labels are other data.
        let mut others = rows.clone();
        if let Row::Labelled(marked) | Row::Tagged(marked) = &mut others[0] {
            marked.marks[0].label =
                labels(case).iter().find(|label| **label != marked.marks[0].label).unwrap().to_string();
        }
        let from = From { resume: Some(snapshot), ..From::default() };
        let error = run(&base, &task, &others, from, &mut Recorder::default()).unwrap_err();
        assert!(error.to_string().contains("the data differ"), "{case}: {error}");
    }
}

/// However a step's rows are split, each text and each word weighs the same.
#[test]
fn micro_batches_change_nothing() {
    let base = base();
    for case in ["sequence_lora", "token_lora"] {
        let run = |batch_size: u64, accumulation: u64| {
            let training = json!({"n_epochs": 1, "batch_size": batch_size, "grad_accumulation": accumulation});
            finish(&base, &task(&base, case, cases()[0].1.clone(), training), &rows(case), From::default()).1
        };
        let (whole, split) = (run(4, 1), run(1, 4));
        assert!((whole.losses()[0] - split.losses()[0]).abs() < 1e-6, "{case}");
        assert!((whole.norms()[0] / split.norms()[0] - 1.0).abs() < 1e-4, "{case}");
        assert_eq!(whole.metrics[0].figures, split.metrics[0].figures, "{case}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let base = base();
    let error = |case: &str, rows: &[Row], start: Option<&AdapterFiles>| -> String {
        let training = json!({"n_epochs": 1, "batch_size": 2});
        let task = task(&base, case, cases()[0].1.clone(), training);
        let error = run(&base, &task, rows, From { start, ..From::default() }, &mut Recorder::default()).unwrap_err();
        assert!(matches!(error, TrainError::Data(_)), "{error:?}");
        error.to_string()
    };
    let mut strange = rows("sequence_lora");
    if let Row::Labelled(marked) = &mut strange[1] {
        marked.marks[0].label = "blue".to_owned();
    }
    let text = error("sequence_lora", &strange, None);
    assert_eq!(text, "training row of line 2: blue is not one of bad, good, so so");
    let text = error("sequence_lora", &rows("token_lora"), None);
    assert!(text.contains("reads: labelled texts"), "{text}");
    // A head of other labels.
    let start = adapter("sequence_lora/adapter_init", &["a", "b", "c"]);
    let text = error("sequence_lora", &rows("sequence_lora"), Some(&start));
    assert!(text.contains("cannot train on the adapter's head"), "{text}");

    let refusal = |files: &AdapterFiles| match methods::load(files, &base) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("the files were taken"),
    };
    let tensors = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let files = adapter("token_lora/adapter_init", &TAGS);
        let mut tensors = safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
        change(&mut tensors);
        let dir = tempfile::tempdir().unwrap();
        safetensors::save(&tensors, dir.path().join("a")).unwrap();
        AdapterFiles { weights: fs::read(dir.path().join("a")).unwrap(), ..files }
    };
    let (weight, bias) = ("base_model.model.score.weight", "base_model.model.score.bias");
    let text = refusal(&tensors(&|all| drop(all.remove(weight))));
    assert!(text.contains("score.weight is missing"), "{text}");
    let text = refusal(&tensors(&|all| {
        drop(all.insert(bias.into(), Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap()))
    }));
    assert!(text.contains("score.bias has shape [3], not [4]"), "{text}");
    let text = refusal(&tensors(&|all| {
        let other = all[weight].clone();
        drop(all.insert("base_model.model.classifier.weight".into(), other));
    }));
    assert!(text.contains("two heads"), "{text}");
    // A head of another module's name, and without a bias, is read.
    let renamed = tensors(&|all| {
        all.remove(bias);
        let head = all.remove(weight).unwrap();
        drop(all.insert("base_model.model.classifier.weight".into(), head));
    });
    let hook: Arc<dyn attune::model::Hook> = methods::load(&renamed, &base).unwrap();
    assert_eq!(hook.task_head().unwrap().width(), 4);
    for labels in [&["a", "b", "c"][..], &["a", "b", "c", "c"]] {
        let text = refusal(&adapter("token_lora/adapter_init", labels));
        assert!(text.contains("id2label"), "{text}");
    }
}
