//! Learning from the model's own completions: advantages and slopes, graders, and runs whose completions come from
//! the engine.

use std::{cell::RefCell, collections::BTreeMap, fs, path::PathBuf};

use attune::{
    data::{Example, Row, Sampled},
    domain::{
        ObjectiveSpec, TrainSpec,
        rollout::{Ask, Policy, Rollout},
        spec::{Grader, GrpoSpec, RlooSpec},
    },
    methods::{self, AdapterFiles},
    model::{Base, Keep, Tape},
    objectives::{
        self, Models,
        grade::{self, Scene, grade},
        grpo,
        online::{Judged, Tokens},
        rloo,
    },
    trainer::TrainError,
};
use candle_core::{Device, Tensor, safetensors};
use serde_json::{Value, json};

use crate::support::{
    stage::{Stage, figures, objective, prompts},
    tiny::Random,
    training::{From, Recorder, create, run},
};

fn grpo_spec(knobs: Value) -> GrpoSpec {
    match objective("grpo", knobs) {
        ObjectiveSpec::Grpo(spec) => spec,
        other => panic!("{other:?}"),
    }
}

fn rloo_spec(knobs: Value) -> RlooSpec {
    match objective("rloo", knobs) {
        ObjectiveSpec::Rloo(spec) => spec,
        other => panic!("{other:?}"),
    }
}

fn close(found: &[Vec<f64>], expected: &[Vec<f64>]) {
    let pairs = found.concat().into_iter().zip(expected.concat());
    assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-9), "{found:?} {expected:?}");
}

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/preference").join(path)
}

fn read(path: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(path)).unwrap()).unwrap()
}

/// Numbers of `tests/fixtures/preference/make.py`: torch's mean and std.
#[test]
fn advantages_are_torchs() {
    let stored = read("advantages.json");
    let table = |name: &str| -> Vec<Vec<f64>> { serde_json::from_value(stored[name].clone()).unwrap() };
    let rewards = table("rewards");
    for scale in ["group", "batch", "none"] {
        let spec = grpo_spec(json!({"scale_rewards": scale}));
        close(&grpo::advantages(&spec, &rewards), &table(scale));
    }
    close(&rloo::advantages(&rewards), &table("rloo"));
}

#[test]
fn slopes_are_the_derivatives() {
    let mut random = Random(5);
    let mut numbers = |n: usize| -> Vec<f64> { (0..n).map(|_| -3.0 * f64::from(random.uniform()) - 0.1).collect() };
    let step = 1e-6;
    for round in 0..20 {
        let (policy, old, reference) = (numbers(4), numbers(4), numbers(4));
        let advantage = if round % 2 == 0 { 1.3 } else { -0.7 };
        let total = |judge: &dyn Fn(Tokens) -> Judged, policy: &[f64]| -> f64 {
            let tokens = Tokens { policy, old: &old, reference: &reference, advantage, worth: &[] };
            judge(tokens).losses.iter().map(|(loss, _)| loss).sum()
        };
        let grpo = grpo_spec(json!({"beta": 0.4, "epsilon": 0.3}));
        let rloo = rloo_spec(json!({"epsilon": 0.3}));
        let judges: [&dyn Fn(Tokens) -> Judged; 2] =
            [&|tokens| grpo::judge(&grpo, tokens), &|tokens| rloo::judge(&rloo, tokens)];
        for judge in judges {
            let slopes =
                judge(Tokens { policy: &policy, old: &old, reference: &reference, advantage, worth: &[] }).losses;
            for i in 0..4 {
                let moved = |by: f64| {
                    let mut policy = policy.clone();
                    policy[i] += by;
                    total(judge, &policy)
                };
                let expected = (moved(step) - moved(-step)) / (2.0 * step);
                assert!((slopes[i].1 - expected).abs() < 1e-5 * expected.abs().max(1.0), "{} {expected}", slopes[i].1);
            }
        }
    }
}

#[test]
fn clipping_ends_a_gradient_on_the_far_side_only() {
    let spec = grpo_spec(json!({"epsilon": 0.2}));
    let judge = |log_ratio: f64, advantage: f64| {
        let tokens = Tokens { policy: &[log_ratio], old: &[0.0], reference: &[], advantage, worth: &[] };
        let found = grpo::judge(&spec, tokens);
        (found.losses[0], found.clipped)
    };
    // A good token that became much likelier is left alone; one that became rarer is drawn back. Bad ones the other way.
    assert_eq!(judge(1.0, 2.0), ((-2.4, 0.0), (1, 1)));
    assert_eq!(judge(-1.0, 2.0).0.1, -2.0 * (-1f64).exp());
    assert_eq!(judge(-1.0, -2.0), ((1.6, 0.0), (1, 1)));
    assert_eq!(judge(1.0, -2.0).0.1, 2.0 * 1f64.exp());
    assert_eq!(judge(0.0, 0.5), ((-0.5, -0.5), (0, 1)));
}

/// Completions with the log-probabilities that they were drawn by.
fn stored_completions() -> Vec<Row> {
    let rows = read("rows.json");
    let row = |row: &Value| {
        let ids = |name: &str| -> Vec<u32> { serde_json::from_value(row[name].clone()).unwrap() };
        let log_probs = |name: &str| -> Vec<f64> { serde_json::from_value(row[name].clone()).unwrap() };
        let (prompt, answer) = (ids("prompt"), ids("completion"));
        let labels = prompt.iter().map(|_| None).chain(answer.iter().copied().map(Some)).collect();
        Row::Sampled(Sampled {
            example: Example { line: 1, ids: [prompt, answer].concat(), labels },
            advantage: row["advantage"].as_f64().unwrap(),
            temperature: rows["temperature"].as_f64().unwrap(),
            old: Some(log_probs("old")),
            reference: log_probs("reference"),
            worth: Vec::new(),
        })
    };
    rows["sampled"].as_array().unwrap().iter().map(row).collect()
}

/// TRL's trainers on the same adapter and completions, at a temperature, with ratios that are clipped: loss, figures
/// and every gradient.
#[test]
fn first_losses_and_gradients_are_trls() {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/base");
    let (base, cases) = (Base::open("golden", &golden).unwrap(), read("cases.json"));
    let of = |loss: &str, beta: f64| json!({"loss_type": loss, "beta": beta, "max_completion_length": 9});
    for (case, name, knobs) in [
        ("dapo", "grpo", of("dapo", 0.3)),
        ("grpo", "grpo", of("grpo", 0.3)),
        ("bnpo", "grpo", of("bnpo", 0.3)),
        ("dr_grpo", "grpo", of("dr_grpo", 0.3)),
        ("first", "grpo", of("dapo", 0.0)),
        ("rloo", "rloo", json!({})),
    ] {
        let case = format!("online_{case}");
        let file = |name: &str| fs::read(fixture("adapter").join(name)).unwrap();
        let files = AdapterFiles { config: file("adapter_config.json"), weights: file("adapter_model.safetensors") };
        let (spec, method) = (objective(name, knobs), methods::resume(&files, &base).unwrap());
        let (objective, tape) = (objectives::of(&spec), RefCell::new(Tape::new(Keep::Everything)));
        let method = method.as_ref();
        let models = Models { base: &base, method, reference: None, train: Some(1), tape: &tape, limit: 64 };
        let mut rows = stored_completions();
        for row in &mut rows {
            let Row::Sampled(sampled) = row else { panic!() };
            if case == "online_first" {
                sampled.old = None;
            }
            if case == "online_first" || name == "rloo" {
                sampled.reference.clear();
            }
        }
        let rows: Vec<&Row> = rows.iter().collect();
        let (found, counts) = (objective.pass(&models, &rows).unwrap(), objective.counts(&rows));
        let (loss, expected) = (found.terms[0].value / counts[0], cases[&case]["loss"].as_f64().unwrap());
        assert!((loss - expected).abs() < 1e-5 * expected.abs().max(0.1), "{case}: {loss} {expected}");
        let (means, theirs) = (found.figures.means(), &cases[&case]["figures"]);
        let expected = theirs["clip_ratio/region_mean"].as_f64().unwrap();
        assert!((means["clip_ratio"] - expected).abs() < 1e-5, "{case}: {} {expected}", means["clip_ratio"]);
        assert!(case == "online_first" || means["clip_ratio"] > 0.0, "{case}");

        let gradients = found.terms[0].gradient.affine(1.0 / counts[0], 0.0).unwrap().backward().unwrap();
        let expected = safetensors::load(fixture(&format!("{case}.safetensors")), &Device::Cpu).unwrap();
        assert_eq!(expected.len(), method.variables().len(), "{case}");
        for (name, variable) in method.variables() {
            let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (found, expected) = (values(gradients.get(variable.as_tensor()).unwrap()), values(&expected[&name]));
            let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert!(largest > 0.0, "{case} {name} has no gradient");
            let is_near = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4 * largest);
            assert!(is_near, "{case} {name}: {found:?} {expected:?}");
        }
    }
}

fn grader(value: Value) -> Grader {
    serde_json::from_value(value).unwrap()
}

#[test]
fn graders_read_the_row_and_the_answer() {
    let item = json!({"messages": [], "label": "Paris", "n": 3, "deep": {"er": "x"}});
    let value = |spec: &Value, text: &str| grade(&grader(spec.clone()), &Scene::new(&item, text)).unwrap();
    let check = |operation: &str, reference: &str| {
        json!({"type": "string_check", "name": "c", "input": "{{sample.output_text}}", "reference": reference,
               "operation": operation})
    };
    for (spec, text, expected) in [
        (check("eq", "{{item.label}}"), "Paris", 1.0),
        (check("eq", "{{ item.label }}"), "paris", 0.0),
        (check("ne", "{{item.label}}"), "Rome", 1.0),
        (check("like", "{{item.label}}"), "It is Paris.", 1.0),
        (check("like", "{{item.label}}"), "It is paris.", 0.0),
        (check("ilike", "{{item.label}}"), "It is paris.", 1.0),
        (check("eq", "{{item.n}}-{{item.deep.er}}"), "3-x", 1.0),
    ] {
        assert_eq!(value(&spec, text), expected, "{spec} {text}");
    }
    let of_json = json!({"type": "string_check", "name": "j", "input": "{{sample.output_json.city}}",
                         "reference": "{{item.label}}", "operation": "eq"});
    assert_eq!((value(&of_json, r#"{"city": "Paris"}"#), value(&of_json, "Paris")), (1.0, 0.0));
    let text = "{{sample.output_text}}";
    let rules = [
        (json!({"type": "regex", "name": "r", "input": text, "pattern": r"^\d{3}$"}), "123", "1234"),
        (json!({"type": "json_valid", "name": "v", "input": text}), "[1, 2]", "[1, 2"),
        (json!({"type": "length", "name": "l", "input": text, "least": 2, "most": 4}), "äöü", "a"),
    ];
    for (spec, good, bad) in rules {
        assert_eq!((value(&spec, good), value(&spec, bad)), (1.0, 0.0), "{spec}");
    }
    let multi = json!({"type": "multi", "name": "m", "calculate_output": "0.25 * same + 0.75 * near",
        "graders": {"same": check("eq", "{{item.label}}"),
                    "near": {"type": "text_similarity", "name": "n", "input": text, "reference": "{{item.label}}",
                             "evaluation_metric": "fuzzy_match"}}});
    assert_eq!((value(&multi, "Paris"), value(&multi, "")), (1.0, 0.0));
    assert!((value(&multi, "Pars") - 0.75 * 8.0 / 9.0).abs() < 1e-12);
    // What is not there is said.
    let missing = grade(&grader(check("eq", "{{item.town}}")), &Scene::new(&item, "a")).unwrap_err();
    assert!(missing.to_string().contains("item.town"), "{missing}");
    let mut wrong = multi.clone();
    wrong["calculate_output"] = json!("same + far");
    assert!(grade::check(&grader(wrong)).unwrap_err().to_string().contains("far"));
    assert!(grade::check(&grader(multi)).is_ok());
}

#[test]
fn what_a_request_may_ask_is_checked_by_field() {
    let good = json!({"type": "json_valid", "name": "j", "input": "{{sample.output_text}}"});
    let refusal = |method: Value| {
        let error = ObjectiveSpec::from_json(&method).unwrap_err();
        (error.param, error.code)
    };
    let with = |name: &str, grader: &Value, knobs: Value| json!({"type": name, name: {"grader": grader, "hyperparameters": knobs}});
    for (method, param, code) in [
        (json!({"type": "grpo"}), "method.grpo.grader", "spec_missing"),
        (
            json!({"type": "reinforcement", "reinforcement": {"hyperparameters": {}}}),
            "method.reinforcement.grader",
            "spec_missing",
        ),
        (
            with("grpo", &good, json!({"num_generations": 1})),
            "method.grpo.hyperparameters.num_generations",
            "spec_out_of_range",
        ),
        (
            with("rloo", &good, json!({"temperature": 0})),
            "method.rloo.hyperparameters.temperature",
            "spec_out_of_range",
        ),
        (with("grpo", &good, json!({"epsilon": 1})), "method.grpo.hyperparameters.epsilon", "spec_out_of_range"),
        (with("grpo", &good, json!({"loss_type": "x"})), "method.grpo.hyperparameters.loss_type", "spec_invalid_type"),
        (with("grpo", &good, json!({"grader": good})), "method.grpo.hyperparameters.grader", "spec_unknown_field"),
        (with("dpo", &good, json!({})), "method.dpo.grader", "spec_unknown_field"),
        (
            with("grpo", &json!({"type": "regex", "name": "r", "input": "a", "pattern": "("}), json!({})),
            "method.grpo.grader.pattern",
            "spec_invalid_grader",
        ),
        (
            with("grpo", &json!({"type": "length", "name": "l", "input": "a", "least": 3, "most": 2}), json!({})),
            "method.grpo.grader.least",
            "spec_invalid_grader",
        ),
    ] {
        let found = refusal(method.clone());
        assert_eq!((found.0.as_str(), found.1), (param, code), "{method}");
    }
    let unknown = refusal(with("grpo", &json!({"type": "score_model", "name": "s"}), json!({})));
    assert!(unknown.0.starts_with("method.grpo.grader"), "{unknown:?}");
}

/// The reward rises, and in the first update of each step the policy is the one that drew.
#[test]
fn rewards_rise() {
    let stage = Stage::new();
    let training = json!({"n_epochs": 20, "batch_size": 2, "learning_rate": 1e-2, "lr_scheduler": "constant",
                          "max_seq_len": 64});
    for (name, knobs) in [
        ("grpo", json!({"num_generations": 6, "max_completion_length": 8})),
        ("rloo", json!({"num_generations": 6, "max_completion_length": 8, "beta": 0.01})),
    ] {
        let task = stage.task(name, knobs, training.clone());
        let (_, recorder) = stage.finish(&task, &prompts(2), None);
        let rewards = figures(&recorder, "reward");
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (first, last) = (mean(&rewards[..4]), mean(&rewards[16..]));
        assert!(last > first + 0.2, "{name}: {rewards:?}");
        let apart = figures(&recorder, "ratio").into_iter().map(|ratio| (ratio - 1.0).abs()).fold(0.0, f64::max);
        assert!(apart < 1e-5, "{name}: ρ is off by {apart} where the policy is the one that drew");
        assert!(figures(&recorder, "completions/mean_length").iter().all(|length| (1.0..=8.0).contains(length)));
    }
}

/// Several updates on the same completions move the ratio; a reference gives a divergence. All of it comes again, to
/// the bit, from each checkpoint.
#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    let stage = Stage::new();
    let training =
        json!({"n_epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 1, "max_seq_len": 64});
    let knobs = json!({"num_generations": 4, "max_completion_length": 6, "num_iterations": 2, "beta": 0.1,
                       "temperature": 0.8});
    for name in ["grpo", "rloo"] {
        let task = stage.task(name, knobs.clone(), training.clone());
        let (adapter, whole) = stage.finish(&task, &prompts(3), None);
        assert_eq!(whole.metrics.len(), 4);
        assert!(figures(&whole, "ratio").iter().any(|ratio| (ratio - 1.0).abs() > 1e-5), "{name}");
        assert!(figures(&whole, "kl").iter().skip(1).all(|kl| *kl > 0.0), "{name}");
        for snapshot in &whole.snapshots {
            let (resumed, recorder) = stage.finish(&task, &prompts(3), Some(snapshot));
            assert_eq!(resumed, adapter, "{name} from step {}", snapshot.step);
            let rest = &whole.metrics[snapshot.step as usize..];
            let same = recorder
                .metrics
                .iter()
                .zip(rest)
                .all(|(a, b)| (a.train_loss, &a.figures) == (b.train_loss, &b.figures));
            assert!(same, "{name} from step {}", snapshot.step);
        }
    }
}

/// Each way to normalise, over one micro-batch and over several.
#[test]
fn normalisers_do_not_depend_on_the_split() {
    let stage = Stage::new();
    for loss_type in ["dapo", "grpo", "dr_grpo"] {
        let first = |batch_size: u64, grad_accumulation: u64| {
            let training = json!({"max_steps": 1, "batch_size": batch_size, "grad_accumulation": grad_accumulation,
                                  "max_seq_len": 64});
            let knobs = json!({"num_generations": 4, "max_completion_length": 9, "loss_type": loss_type});
            let task = stage.task("grpo", knobs, training);
            let (_, recorder) = stage.finish(&task, &prompts(4), None);
            (recorder.losses()[0], recorder.norms()[0])
        };
        let (whole, split) = (first(4, 1), first(1, 4));
        assert!(
            (whole.0 - split.0).abs() < 1e-5 && (whole.1 - split.1).abs() < 1e-4 * whole.1,
            "{loss_type}: {whole:?} {split:?}"
        );
        assert!(whole.1 > 0.0);
    }
}

/// What is drawn is a function of the policy and the seed, whoever else is served meanwhile.
#[test]
fn completions_come_from_their_seeds() {
    let stage = Stage::new();
    let adapter = attune::domain::MethodSpec::from_json(&json!({"r": 3, "alpha": 7})).unwrap();
    let files = create(&adapter, &stage.base, 3).export().unwrap();
    let policy = Policy { config: &files.config, weights: &files.weights };
    let ask = |seed: u64| Ask { prompt: vec![5, 6, 7], max_tokens: 12, temperature: 1.0, seed };
    let asks: Vec<Ask> = (0..40).map(ask).collect();
    let all = stage.rollout.sample(policy, &asks).unwrap();
    assert_eq!(all.len(), 40);
    assert_eq!(stage.rollout.sample(policy, &asks[17..18]).unwrap(), [all[17].clone()]);
    let distinct: BTreeMap<&[u32], ()> = all.iter().map(|one| (one.ids.as_slice(), ())).collect();
    assert!(distinct.len() > 30);
    for one in &all {
        assert_eq!(one.is_ended, one.ids.last() == Some(&258), "{one:?}");
        assert!(one.is_ended || one.ids.len() == 12);
    }
}

#[test]
fn a_run_without_a_world_says_so() {
    let stage = Stage::new();
    let task = stage.task("grpo", json!({"max_completion_length": 8}), json!({"batch_size": 1, "max_seq_len": 64}));
    let error = run(&stage.base, &task, &prompts(2), From::default(), &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::Data(_)), "{error}");
    // A prompt that leaves no room for its completion is left out.
    let mut rows = prompts(2);
    let Row::Prompt(long) = &mut rows[0] else { panic!() };
    long.text = Example { line: 1, ids: vec![9; 60], labels: vec![None; 60] };
    let task = TrainSpec { training: attune::domain::Training { max_steps: Some(1), ..task.training.clone() }, ..task };
    let (_, recorder) = stage.finish(&task, &rows, None);
    assert_eq!(recorder.messages, ["1 of 2 training rows are left out: longer than 56 tokens"]);
}
