//! Objectives over preferences: against torch and TRL (`tests/fixtures/preference/make.py`), against their own
//! derivatives, and through the loop.

use std::{fs, path::PathBuf, sync::Arc};

use attune::{
    data::{Example, Judged, Pair, Row},
    domain::{
        ObjectiveSpec, TaskHead, TrainSpec,
        spec::{DpoSpec, IpoSpec, KtoSpec, OrpoSpec, RewardModelSpec, SimpoSpec},
    },
    methods::{self, AdapterFiles},
    model::Base,
    objectives::{
        self, Models, dpo, ipo, kto, orpo,
        preference::{Side, Verdict},
        reward_model, simpo,
    },
    trainer::TrainError,
};
use candle_core::{Device, safetensors};
use serde_json::{Value, json};

use crate::support::{
    tiny::{Random, Tiny},
    training::{From, Recorder, finish, rows, run, spec},
};

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/preference").join(path)
}

fn read(path: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(path)).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn objective(name: &str, knobs: &Value) -> ObjectiveSpec {
    ObjectiveSpec::from_json(&json!({"type": name, name: {"hyperparameters": knobs}})).unwrap()
}

/// The judge of one pair, by name and knobs.
fn judge(name: &str, knobs: &Value, sides: [Side; 2]) -> Verdict {
    match objective(name, knobs) {
        ObjectiveSpec::Dpo(spec) => dpo::verdict(&spec, sides),
        ObjectiveSpec::Ipo(spec) => ipo::verdict(&spec, sides),
        ObjectiveSpec::Simpo(spec) => simpo::verdict(&spec, sides),
        ObjectiveSpec::Orpo(spec) => orpo::verdict(&spec, sides),
        other => panic!("{other:?} judges no pairs"),
    }
}

#[test]
fn losses_of_given_log_probabilities_are_torchs() {
    let stored = read("losses.json");
    let input = |name: &str| numbers(&stored["inputs"][name]);
    let (beta, z) = (stored["beta"].as_f64().unwrap(), stored["z"].as_f64().unwrap());
    let side = |name: &str, i: usize, with_reference: bool| Side {
        log_prob: input(name)[i],
        reference: if with_reference { input(&format!("reference_{name}"))[i] } else { 0.0 },
        tokens: input(&format!("tokens_{name}"))[i],
    };
    let cases = [
        ("dpo_sigmoid", "dpo", json!({"beta": beta}), true),
        ("dpo_robust_0.1", "dpo", json!({"beta": beta, "loss_type": "robust", "label_smoothing": 0.1}), true),
        ("dpo_hinge", "dpo", json!({"beta": beta, "loss_type": "hinge"}), true),
        ("dpo_sigmoid_norm", "dpo", json!({"beta": beta, "loss_type": "sigmoid_norm"}), true),
        ("ipo", "ipo", json!({"beta": beta}), true),
        ("orpo", "orpo", json!({"beta": beta}), false),
        ("simpo_2_1", "simpo", json!({"beta": 2, "gamma": 1}), false),
    ];
    for (stored_name, name, knobs, with_reference) in cases {
        for (i, expected) in numbers(&stored["losses"][stored_name]).into_iter().enumerate() {
            let sides = [side("chosen", i, with_reference), side("rejected", i, with_reference)];
            let found = judge(name, &knobs, sides).loss;
            assert!((found - expected).abs() < 1e-9 * expected.abs().max(1.0), "{stored_name}: {found} {expected}");
        }
    }
    let spec = KtoSpec { beta, ..KtoSpec::default() };
    for (stored_name, name, is_desirable) in [("kto_desirable", "chosen", true), ("kto_undesirable", "rejected", false)]
    {
        for (i, expected) in numbers(&stored["losses"][stored_name]).into_iter().enumerate() {
            let (found, _) = kto::loss(&spec, is_desirable, &side(name, i, true), z);
            assert!((found - expected).abs() < 1e-9, "{stored_name}: {found} {expected}");
        }
    }
}

#[test]
fn slopes_are_the_derivatives() {
    let mut random = Random(3);
    let mut side = || Side {
        log_prob: -9.0 * f64::from(random.uniform()) - 0.1,
        reference: -9.0 * f64::from(random.uniform()) - 0.1,
        tokens: 2.0 + random.below(9) as f64,
    };
    let cases = [
        ("dpo", json!({"beta": 0.7})),
        ("dpo", json!({"beta": 0.7, "loss_type": "robust", "label_smoothing": 0.3})),
        ("dpo", json!({"beta": 0.7, "loss_type": "hinge"})),
        ("dpo", json!({"beta": 0.7, "loss_type": "sigmoid_norm"})),
        ("ipo", json!({"beta": 0.7})),
        ("orpo", json!({"beta": 0.7})),
        ("simpo", json!({"beta": 1.7, "gamma": 0.4})),
    ];
    let step = 1e-6;
    for _ in 0..20 {
        let sides = [side(), side()];
        for (name, knobs) in &cases {
            for of in 0..2 {
                let moved = |by: f64| {
                    let mut sides = sides;
                    sides[of].log_prob += by;
                    judge(name, knobs, sides).loss
                };
                let (found, expected) =
                    (judge(name, knobs, sides).slopes[of], (moved(step) - moved(-step)) / (2.0 * step));
                assert!((found - expected).abs() < 1e-6, "{name} {knobs}, side {of}: {found} {expected}");
            }
        }
        let spec = RewardModelSpec { center_rewards_coefficient: 0.3 };
        let scores = sides.map(|side| side.reference);
        for of in 0..2 {
            let moved = |by: f64| {
                let mut scores = scores;
                scores[of] += by;
                reward_model::loss(&spec, scores, 0.8)
            };
            let expected = (moved(step).0 - moved(-step).0) / (2.0 * step);
            assert!((moved(0.0).1[of] - expected).abs() < 1e-6, "reward_model: {:?} {expected}", moved(0.0).1);
        }
        let spec = KtoSpec { beta: 0.6, desirable_weight: 1.3, undesirable_weight: 0.7 };
        for is_desirable in [true, false] {
            let loss =
                |by: f64| kto::loss(&spec, is_desirable, &Side { log_prob: sides[0].log_prob + by, ..sides[0] }, 0.4);
            let expected = (loss(step).0 - loss(-step).0) / (2.0 * step);
            assert!((loss(0.0).1 - expected).abs() < 1e-6, "kto: {} {expected}", loss(0.0).1);
        }
    }
}

/// `log σ` and `log(1 − e^p)` far out: nothing overflows, and a certain answer is not infinitely good.
#[test]
fn extreme_log_probabilities_stay_finite() {
    let side = |log_prob: f64, reference: f64| Side { log_prob, reference, tokens: 3.0 };
    let pairs = [[side(0.0, -9e3), side(-9e3, 0.0)], [side(-9e3, 0.0), side(0.0, -9e3)], [side(0.0, 0.0); 2]];
    for sides in pairs {
        for name in ["dpo", "ipo", "orpo", "simpo"] {
            let found = judge(name, &json!({}), sides);
            assert!(found.loss.is_finite() && found.slopes.iter().all(|slope| slope.is_finite()), "{name}: {found:?}");
        }
    }
}

/// A prompt and its answer, which alone is trained on.
fn text(prompt: &Value, answer: &Value) -> Example {
    let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let (prompt, answer) = (ids(prompt), ids(answer));
    let labels = prompt.iter().map(|_| None).chain(answer.iter().copied().map(Some)).collect();
    Example { line: 1, ids: [prompt, answer].concat(), labels }
}

fn stored_pairs() -> Vec<Row> {
    let rows = read("rows.json");
    let pair = |row: &Value| Pair {
        chosen: text(&row["prompt"], &row["chosen"]),
        rejected: text(&row["prompt"], &row["rejected"]),
        margin: row["margin"].as_f64().unwrap(),
        probability: 1.0,
    };
    rows["pairs"].as_array().unwrap().iter().map(|row| Row::Pair(pair(row))).collect()
}

fn stored_judged() -> Vec<Row> {
    let rows = read("rows.json");
    let judged = |row: &Value| Judged {
        example: text(&row["prompt"], &row["completion"]),
        is_desirable: row["label"].as_bool().unwrap(),
    };
    rows["judged"].as_array().unwrap().iter().map(|row| Row::Judged(judged(row))).collect()
}

fn adapter(path: &str) -> AdapterFiles {
    let file = |name| fs::read(fixture(path).join(name)).unwrap();
    AdapterFiles { config: file("adapter_config.json"), weights: file("adapter_model.safetensors") }
}

/// TRL's trainers on the same adapter, rows and reference: loss, figures and every gradient.
#[test]
fn first_losses_and_gradients_are_trls() {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/base");
    let (base, cases) = (Base::open("golden", &golden).unwrap(), read("cases.json"));
    let table = [
        ("dpo", "dpo", json!({"beta": 0.3})),
        ("dpo_robust", "dpo", json!({"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.2})),
        ("dpo_hinge", "dpo", json!({"beta": 0.3, "loss_type": "hinge"})),
        ("dpo_norm", "dpo", json!({"beta": 0.3, "loss_type": "sigmoid_norm"})),
        ("dpo_continued", "dpo", json!({"beta": 0.3})),
        ("ipo", "ipo", json!({"beta": 0.3})),
        ("kto", "kto", json!({"beta": 0.4, "desirable_weight": 1.25, "undesirable_weight": 0.75})),
        ("orpo", "orpo", json!({"beta": 0.3})),
        ("simpo", "simpo", json!({"beta": 1.5, "gamma": 0.8})),
        ("reward", "reward_model", json!({})),
        ("reward_margin", "reward_model", json!({"center_rewards_coefficient": 0.05})),
    ];
    for (case, name, knobs) in table {
        let spec = objective(name, &knobs);
        let files = adapter(if name == "reward_model" { "reward" } else { "adapter" });
        let objective = objectives::of(&spec);
        let method = methods::resume(&files, &base).unwrap();
        let continued = methods::load(&files, &base).unwrap();
        let reference = Some(&continued).filter(|_| case == "dpo_continued");
        let tape = std::cell::RefCell::new(attune::model::Tape::new(attune::model::Keep::Everything));
        let method = method.as_ref();
        let models = Models { base: &base, method, reference, train: Some(1), tape: &tape, limit: 64 };
        let mut rows = if name == "kto" { stored_judged() } else { stored_pairs() };
        if case == "reward" {
            rows.iter_mut().for_each(|row| {
                if let Row::Pair(pair) = row {
                    pair.margin = 0.0;
                }
            });
        }
        let rows: Vec<&Row> = rows.iter().collect();

        let (found, counts) = (objective.pass(&models, &rows).unwrap(), objective.counts(&rows));
        let terms = || found.terms.iter().zip(&counts);
        let loss: f64 = terms().map(|(term, count)| term.value / count).sum();
        let expected = cases[case]["loss"].as_f64().unwrap();
        assert!((loss - expected).abs() < 1e-5 * expected, "{case}: {loss} {expected}");

        let mut means = found.figures.means();
        for (ours, theirs) in [("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")] {
            means.insert(theirs.to_owned(), means[ours]);
        }
        let compared = cases[case]["figures"].as_object().unwrap().iter().filter(|(figure, _)| {
            ["rewards/", "logps/"].iter().any(|start| figure.starts_with(start))
                || ["kl", "accuracy", "margin"].contains(&figure.as_str())
        });
        let compared: Vec<_> = compared.collect();
        assert!(compared.len() >= if name == "reward_model" { 2 } else { 5 }, "{case}: {compared:?}");
        for (figure, expected) in compared {
            let (found, expected) = (means[figure], expected.as_f64().unwrap());
            assert!((found - expected).abs() < 1e-5 * expected.abs().max(0.1), "{case} {figure}: {found} {expected}");
        }

        let parts = terms().map(|(term, count)| term.gradient.affine(1.0 / count, 0.0).unwrap());
        let sum = parts.reduce(|a, b| (a + b).unwrap()).unwrap();
        let gradients = sum.backward().unwrap();
        let expected = safetensors::load(fixture(&format!("{case}.safetensors")), &Device::Cpu).unwrap();
        assert_eq!(expected.len(), method.variables().len(), "{case}");
        for (name, variable) in method.variables() {
            let values = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (found, expected) = (values(gradients.get(variable.as_tensor()).unwrap()), values(&expected[&name]));
            let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert!(largest > 0.0, "{case} {name} has no gradient");
            let is_near = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4 * largest);
            assert!(is_near, "{case} {name}: {found:?} {expected:?}");
        }
    }
}

fn base() -> Arc<Base> {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    Base::open("tiny", dir.path()).unwrap()
}

/// Pairs that share their first two tokens, of uneven lengths.
fn pairs(n: usize, seed: u64) -> Vec<Row> {
    let mut random = Random(seed);
    let lengths: Vec<usize> = (0..2 * n).map(|_| 5 + random.below(9)).collect();
    let texts = rows(&lengths, seed);
    let pair = |two: &[Example]| {
        let (chosen, mut rejected) = (two[0].clone(), two[1].clone());
        rejected.ids[..2].copy_from_slice(&chosen.ids[..2]);
        Row::Pair(Pair { chosen, rejected, margin: 0.0, probability: 1.0 })
    };
    texts.chunks(2).map(pair).collect()
}

/// Answers with thumbs, up and down by turns.
fn judged(n: usize, seed: u64) -> Vec<Row> {
    let thumb = |(i, example)| Row::Judged(Judged { example, is_desirable: i % 2 == 0 });
    rows(&(0..n).map(|i| 5 + i * 3 % 7).collect::<Vec<_>>(), seed).into_iter().enumerate().map(thumb).collect()
}

/// A run's spec; dropout is asked for and must not matter.
fn task(base: &Base, name: &str, knobs: &Value, training: Value) -> TrainSpec {
    let adapter = json!({"type": "lora", "r": 3, "alpha": 7, "dropout": 0.3});
    TrainSpec { objective: objective(name, knobs), ..spec(base, adapter, training) }
}

fn figures(recorder: &Recorder, name: &str) -> Vec<f64> {
    recorder.metrics.iter().map(|metrics| metrics.figures[name]).collect()
}

#[test]
fn every_objective_learns_what_is_preferred() {
    let base = base();
    let training = json!({"n_epochs": 25, "batch_size": 3, "learning_rate": 5e-3, "lr_scheduler": "constant"});
    for name in ["dpo", "ipo", "kto", "orpo", "simpo", "reward_model"] {
        let rows = if name == "kto" { judged(6, 4) } else { pairs(6, 4) };
        let knobs = if name == "reward_model" { json!({}) } else { json!({"beta": 0.5}) };
        let mut task = task(&base, name, &knobs, training.clone());
        if name == "kto" {
            // Both kinds in every step, so that each has a margin.
            task.training.batch_size = 6;
        }
        let (_, recorder) = finish(&base, &task, &rows, From::default());
        let (losses, margins) = (recorder.losses(), figures(&recorder, "rewards/margins"));
        let (first, last) = (&losses[..2], &losses[losses.len() - 2..]);
        assert!(last.iter().sum::<f64>() < 0.7 * first.iter().sum::<f64>(), "{name}: {losses:?}");
        assert!(margins.last().unwrap() > &0.5 && margins.last().unwrap() > &margins[0], "{name}: {margins:?}");
        assert_eq!(figures(&recorder, "rewards/accuracies").last(), Some(&1.0), "{name}");
        assert!(recorder.metrics.iter().all(|metrics| metrics.train_mean_token_accuracy.is_none()));
    }
}

/// A fresh adapter is its own reference: the losses of no difference, whatever the dropout.
#[test]
fn a_run_begins_at_its_reference() {
    let base = base();
    let training = json!({"n_epochs": 1, "batch_size": 4, "learning_rate": 1e-3});
    let first = |name: &str, rows: &[Row], start: Option<&AdapterFiles>| {
        let spec = task(&base, name, &json!({"beta": 0.4}), training.clone());
        finish(&base, &spec, rows, From { start, ..From::default() }).1.losses()[0]
    };
    let (pairs, judged) = (pairs(4, 8), judged(4, 8));
    assert_eq!(first("dpo", &pairs, None), 2f64.ln());
    assert_eq!(first("ipo", &pairs, None), 1.25 * 1.25);
    assert_eq!(first("kto", &judged, None), 0.5);
    // A continued adapter is measured against itself, not against the base.
    let training = json!({"n_epochs": 4, "batch_size": 2, "learning_rate": 1e-2});
    let (start, _) = finish(&base, &task(&base, "dpo", &json!({}), training), &pairs, From::default());
    assert_eq!(first("dpo", &pairs, Some(&start)), 2f64.ln());
    assert_eq!(first("kto", &judged, Some(&start)), 0.5);
}

/// Every unit weighs the same, whatever the micro-batches: pairs, and for orpo tokens beside them.
#[test]
fn accumulation_does_not_change_a_step() {
    let (base, rows) = (base(), pairs(6, 5));
    for name in ["dpo", "orpo", "simpo", "reward_model"] {
        let curve = |batch_size: u64, grad_accumulation: u64| {
            let training = json!({"n_epochs": 3, "batch_size": batch_size, "grad_accumulation": grad_accumulation,
                                  "learning_rate": 5e-3});
            finish(&base, &task(&base, name, &json!({}), training), &rows, From::default()).1
        };
        let whole = curve(6, 1);
        for (batch, accumulation) in [(2, 3), (1, 6), (4, 2)] {
            let split = curve(batch, accumulation);
            let close =
                |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4 * (b.abs() + 0.1));
            assert!(close(split.losses(), whole.losses()), "{name}: {:?} {:?}", split.losses(), whole.losses());
            assert!(close(split.norms(), whole.norms()), "{name}: {:?} {:?}", split.norms(), whole.norms());
            let of = |recorder: &Recorder| figures(recorder, "rewards/rejected");
            assert!(close(of(&split), of(&whole)), "{name}");
        }
    }
}

/// With a continued adapter as the reference, an odd batch and held-out rows.
#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    let base = base();
    let training = json!({"n_epochs": 2, "batch_size": 2, "learning_rate": 5e-3, "checkpoint_every": 2,
                          "validation_split": 0.2});
    for name in ["dpo", "kto", "orpo", "reward_model"] {
        let rows = if name == "kto" { judged(7, 6) } else { pairs(7, 6) };
        let task = task(&base, name, &json!({}), training.clone());
        let (start, _) = finish(&base, &task, &rows, From::default());
        let from = From { start: Some(&start), ..From::default() };
        let (adapter, whole) = finish(&base, &task, &rows, from);
        assert!(whole.metrics.last().unwrap().figures.contains_key("eval_rewards/accuracies"), "{name}");
        assert!(whole.snapshots.len() > 3);
        for snapshot in &whole.snapshots {
            let (resumed, recorder) = finish(&base, &task, &rows, From { resume: Some(snapshot), ..from });
            assert_eq!(resumed, adapter, "{name} from step {}", snapshot.step);
            let rest = &whole.metrics[snapshot.step as usize..];
            let same = recorder.metrics.iter().zip(rest).all(|(a, b)| {
                (a.train_loss, a.full_valid_loss, &a.figures) == (b.train_loss, b.full_valid_loss, &b.figures)
            });
            assert!(same && recorder.metrics.len() == rest.len(), "{name} from step {}", snapshot.step);
        }
    }
}

/// A label or a margin is part of the data that a checkpoint belongs to.
#[test]
fn a_checkpoint_knows_the_judgements() {
    let (base, mut rows) = (base(), judged(4, 9));
    let task = task(&base, "kto", &json!({}), json!({"n_epochs": 1, "batch_size": 2}));
    let (_, recorder) = finish(&base, &task, &rows, From::default());
    let Row::Judged(first) = &mut rows[0] else { panic!() };
    first.is_desirable = !first.is_desirable;
    let from = From { resume: Some(&recorder.snapshots[1]), ..From::default() };
    let error = run(&base, &task, &rows, from, &mut Recorder::default()).unwrap_err();
    assert!(error.to_string().contains("the data differ"), "{error}");
}

#[test]
fn rows_of_another_kind_are_refused() {
    let base = base();
    let task = task(&base, "dpo", &json!({}), json!({"n_epochs": 1, "batch_size": 2}));
    let error = run(&base, &task, &judged(3, 1), From::default(), &mut Recorder::default()).unwrap_err();
    assert!(matches!(&error, TrainError::Data(text) if text.contains("are not what dpo reads: pairs")), "{error}");
}

/// Too long on either side, or nothing to learn on one: the pair is left out.
#[test]
fn pairs_that_cannot_be_used_are_counted() {
    let (base, mut rows) = (base(), pairs(4, 3));
    let side = |row: &mut Row, change: fn(&mut Example)| {
        let Row::Pair(pair) = row else { panic!() };
        change(&mut pair.rejected);
    };
    side(&mut rows[1], |text| {
        text.ids.resize(40, 7);
        text.labels.resize(40, Some(7));
    });
    side(&mut rows[2], |text| text.labels.fill(None));
    let task = task(&base, "dpo", &json!({}), json!({"n_epochs": 1, "batch_size": 2, "max_seq_len": 30}));
    let (_, recorder) = finish(&base, &task, &rows, From::default());
    assert_eq!(
        recorder.messages,
        [
            "1 of 4 training rows are left out: longer than 30 tokens",
            "1 of 4 training rows are left out: without a trained token"
        ]
    );
}

#[test]
fn defaults_are_trls() {
    assert_eq!(objective("dpo", &json!({"beta": "auto"})), ObjectiveSpec::Dpo(DpoSpec::default()));
    assert_eq!(DpoSpec::default().beta, 0.1);
    assert_eq!((IpoSpec::default().beta, OrpoSpec::default().beta), (0.1, 0.1));
    assert_eq!(KtoSpec::default(), KtoSpec { beta: 0.1, desirable_weight: 1.0, undesirable_weight: 1.0 });
    assert_eq!(SimpoSpec::default(), SimpoSpec { beta: 2.0, gamma: 1.0 });
}

/// The head is stored as PEFT stores it, read back to the bit, and goes on training.
#[test]
fn a_score_head_is_pefts() {
    let base = base();
    let training = json!({"n_epochs": 2, "batch_size": 2, "learning_rate": 1e-2});
    let task = task(&base, "reward_model", &json!({}), training);
    let (files, recorder) = finish(&base, &task, &pairs(4, 8), From::default());
    let config: Value = serde_json::from_slice(&files.config).unwrap();
    assert_eq!(
        (&config["task_type"], &config["modules_to_save"]),
        (&json!("SEQ_CLS"), &json!(["classifier", "score"]))
    );
    let tensors = safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
    assert_eq!(tensors["base_model.model.score.weight"].dims(), [1, base.info.hidden]);
    assert_eq!(methods::resume(&files, &base).unwrap().export().unwrap(), files);
    assert_eq!(methods::load(&files, &base).unwrap().task_head(), Some(&TaskHead::Score));
    assert_eq!(methods::spec_of(&files).unwrap().trainable(&base.info), task.adapter.trainable(&base.info));
    // A continued run begins where the other ended, head and all.
    let (_, on) = finish(&base, &task, &pairs(4, 8), From { start: Some(&files), ..From::default() });
    assert!(on.losses()[0] < recorder.losses()[0], "{:?} {:?}", on.losses(), recorder.losses());
    let other = TrainSpec { objective: objective("dpo", &json!({})), ..task.clone() };
    let from = From { start: Some(&files), ..From::default() };
    let error = run(&base, &other, &pairs(4, 8), from, &mut Recorder::default()).unwrap_err();
    assert!(error.to_string().contains("dpo cannot train on the adapter's head"), "{error}");
    // Two rows are two classes: another task.
    let mut wide = tensors.clone();
    let head = &tensors["base_model.model.score.weight"];
    wide.insert("base_model.model.score.weight".into(), candle_core::Tensor::cat(&[head, head], 0).unwrap());
    let dir = tempfile::tempdir().unwrap();
    safetensors::save(&wide, dir.path().join("a")).unwrap();
    let wide = AdapterFiles { weights: fs::read(dir.path().join("a")).unwrap(), ..files };
    assert!(matches!(methods::score::head(&wide).unwrap(), Some(TaskHead::Sequence { labels }) if labels.len() == 2));
    let from = From { start: Some(&wide), ..From::default() };
    let error = run(&base, &task, &pairs(4, 8), from, &mut Recorder::default()).unwrap_err();
    assert!(error.to_string().contains("reward_model cannot train on"), "{error}");
}
