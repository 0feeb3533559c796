//! Proximal policy optimisation: its arithmetic against torch's and its own derivatives, and runs with a value head;
//! and what holds for every objective that learns from rewards: runs that end at a divergence, rewards that are none.

use attune::{
    data::Worth,
    domain::{
        ObjectiveSpec,
        rollout::{Answer, Reward, Ungraded},
        spec::PpoSpec,
    },
    objectives::{Drawn, Online, online::Tokens, ppo},
    trainer::{Outcome, TrainError},
};
use serde_json::{Value, json};

use crate::support::{
    stage::{LikesEven, Stage, even, figures, objective, prompts},
    tiny::Random,
    training::Recorder,
};

fn spec(knobs: Value) -> PpoSpec {
    match objective("ppo", knobs) {
        ObjectiveSpec::Ppo(spec) => spec,
        other => panic!("{other:?}"),
    }
}

fn close(found: &[f64], expected: &[f64]) {
    let is_near = found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(is_near && found.len() == expected.len(), "{found:?} {expected:?}");
}

/// Numbers of `tests/fixtures/preference/make.py`.
#[test]
fn advantages_are_torchs() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/preference/advantages.json");
    let stored: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let list = |value: &Value| -> Vec<f64> { serde_json::from_value(value.clone()).unwrap() };
    let (rewards, values) = (list(&stored["gae"]["rewards"]), list(&stored["gae"]["values"]));
    for case in stored["gae"]["cases"].as_array().unwrap() {
        let found = ppo::gae(&spec(json!({"gamma": case["gamma"], "lam": case["lam"]})), &rewards, &values);
        close(&found, &list(&case["advantages"]));
        let mut both = vec![found.clone(), found[..2].to_vec()];
        ppo::whiten(&mut both);
        close(&both.concat(), &list(&case["whitened"]));
    }
}

/// The score stands at the last token, less what a missing end costs; the divergence at every one.
#[test]
fn rewards_stand_where_they_were_earned() {
    let drawn = |is_ended: bool| Drawn {
        reward: 2.0,
        is_ended,
        old: vec![-1.0, -2.0, -0.5],
        reference: vec![-1.5, -1.0, -0.5],
        values: vec![0.3, -0.2, 0.1],
    };
    let plain = spec(json!({"missing_eos_penalty": 0.75}));
    close(&ppo::rewards(&plain, &drawn(true), 0.2), &[-0.1, 0.2, 2.0]);
    close(&ppo::rewards(&plain, &drawn(false), 0.2), &[-0.1, 0.2, 1.25]);
    let alone = Drawn { reference: Vec::new(), ..drawn(true) };
    close(&ppo::rewards(&plain, &alone, 0.2), &[0.0, 0.0, 2.0]);

    // What is returned is the advantage before whitening and the value; whitened rewards keep their mean.
    let groups = [vec![drawn(true)], vec![Drawn { reward: -1.0, values: vec![0.0; 3], ..drawn(true) }]];
    let credits = plain.credit(&groups, 0.2);
    let worth: Vec<Worth> = credits.iter().flat_map(|credit| credit.worth.clone()).collect();
    let expected = ppo::gae(&plain, &[-0.1, 0.2, 2.0], &[0.3, -0.2, 0.1]);
    let returned: Vec<f64> = expected.iter().zip([0.3, -0.2, 0.1]).map(|(a, v)| a + v).collect();
    close(&worth[..3].iter().map(|worth| worth.returned).collect::<Vec<_>>(), &returned);
    close(&worth[..3].iter().map(|worth| worth.value).collect::<Vec<_>>(), &[0.3, -0.2, 0.1]);
    let advantages: Vec<f64> = worth.iter().map(|worth| worth.advantage).collect();
    assert!(advantages.iter().sum::<f64>().abs() < 1e-9, "{advantages:?}");
    assert!((advantages.iter().map(|a| a * a).sum::<f64>() / 5.0 - 1.0).abs() < 1e-6, "{advantages:?}");
    let white = spec(json!({"whiten_rewards": true, "gamma": 1, "lam": 1})).credit(&groups, 0.2);
    // With γ = λ = 1 the first token is returned all rewards of its text: together their sum, six times the mean.
    let sum: f64 = white.iter().map(|credit| credit.worth[0].returned).sum();
    assert!((sum - (2.0 - 1.0 + 2.0 * 0.1)).abs() < 1e-9, "{sum}");
}

#[test]
fn slopes_are_the_derivatives() {
    let mut random = Random(8);
    let mut number = |scale: f64| scale * (2.0 * f64::from(random.uniform()) - 1.0);
    let (spec, step) = (spec(json!({"cliprange": 0.3, "cliprange_value": 0.4})), 1e-6);
    let (mut clipped, mut rounds) = (0, 0);
    for _ in 0..200 {
        let worth = Worth { advantage: number(2.0), returned: number(1.0), value: number(1.0) };
        let (policy, old, value) = (number(1.0), number(1.0), number(1.5));
        let loss = |by: f64| {
            let tokens =
                Tokens { policy: &[policy + by], old: &[old], reference: &[], advantage: 9.0, worth: &[worth] };
            ppo::judge(&spec, tokens).losses[0]
        };
        let expected = (loss(step).0 - loss(-step).0) / (2.0 * step);
        assert!((loss(0.0).1 - expected).abs() < 1e-5, "policy: {} {expected}", loss(0.0).1);
        let loss = |by: f64| ppo::value_loss(&spec, &worth, value + by);
        let expected = (loss(step).0 - loss(-step).0) / (2.0 * step);
        assert!((loss(0.0).1 - expected).abs() < 1e-5, "value: {} {expected}", loss(0.0).1);
        clipped += usize::from(loss(0.0).2);
        rounds += 1;
    }
    assert!(clipped > 10 && clipped < rounds - 10, "{clipped}");
}

/// Ziegler et al.: proportional, with the error cut at a fifth.
#[test]
fn the_weight_of_the_divergence_is_steered() {
    let steered = spec(json!({"kl_target": 6, "kl_horizon": 100, "kl_coef": 0.2}));
    for (kl, expected) in [(6.0, 0.2), (6.6, 0.2 * 1.01), (60.0, 0.2 * 1.02), (0.0, 0.2 * 0.98)] {
        let found = steered.next_kl_coef(0.2, kl, 10);
        assert!((found - expected).abs() < 1e-12, "{kl}: {found} {expected}");
    }
    assert_eq!(spec(json!({"kl_coef": 0.2})).next_kl_coef(0.2, 60.0, 10), 0.2);
}

fn training(steps: u64, batch_size: u64) -> Value {
    json!({"max_steps": steps, "n_epochs": steps, "batch_size": batch_size, "learning_rate": 1e-2,
           "lr_scheduler": "constant", "max_seq_len": 64, "checkpoint_every": 1})
}

/// The reward rises, the value head learns what to expect, and the first inner epoch's policy is the one that drew.
#[test]
fn rewards_rise() {
    let stage = Stage::new();
    let knobs = json!({"max_completion_length": 8, "num_ppo_epochs": 3, "kl_coef": 0.01,
                       "vf_learning_rate_multiplier": 1});
    let (_, recorder) = stage.finish(&stage.task("ppo", knobs, training(25, 16)), &prompts(16), None);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let rewards = figures(&recorder, "reward");
    assert!(mean(&rewards[20..]) > mean(&rewards[..4]) + 0.15, "{rewards:?}");
    let off = figures(&recorder, "ratio/first").into_iter().map(|ratio| (ratio - 1.0).abs()).fold(0.0, f64::max);
    assert!(off < 1e-5, "ρ is off by {off} where the policy is the one that drew");
    assert!(figures(&recorder, "ratio").iter().any(|ratio| (ratio - 1.0).abs() > 1e-4));
    let losses = figures(&recorder, "loss/value_avg");
    assert!(mean(&losses[20..]) < 0.85 * losses[0], "{losses:?}");
    for figure in ["entropy", "kl", "objective/kl", "objective/rlhf_reward", "clip_ratio", "val/clipfrac_avg"] {
        assert!(figures(&recorder, figure).iter().all(|value| value.is_finite()), "{figure}");
    }
    // One completion of each prompt: no group has a deviation.
    assert!(!recorder.metrics[0].figures.contains_key("frac_reward_zero_std"));
}

/// From every checkpoint to the bit, with a steered weight; the adapter's files know of no value head.
#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    let stage = Stage::new();
    let knobs = json!({"max_completion_length": 6, "num_ppo_epochs": 2, "kl_coef": 0.1, "kl_target": 0.5,
                       "kl_horizon": 10, "temperature": 0.8});
    let task = stage.task("ppo", knobs, training(4, 2));
    let (adapter, whole) = stage.finish(&task, &prompts(3), None);
    let weights = figures(&whole, "objective/kl_coef");
    assert!(weights[0] == 0.1 && weights.windows(2).all(|two| two[0] != two[1]), "{weights:?}");
    assert!(!String::from_utf8_lossy(&adapter.weights).contains("v_head"));
    for snapshot in &whole.snapshots {
        let (resumed, recorder) = stage.finish(&task, &prompts(3), Some(snapshot));
        assert_eq!(resumed, adapter, "from step {}", snapshot.step);
        let rest = &whole.metrics[snapshot.step as usize..];
        let same =
            recorder.metrics.iter().zip(rest).all(|(a, b)| (a.train_loss, &a.figures) == (b.train_loss, &b.figures));
        assert!(same, "from step {}", snapshot.step);
    }
}

/// A run ends where its completions are too far from the reference; what went too far is not learnt from.
#[test]
fn a_run_ends_at_its_divergence() {
    let stage = Stage::new();
    for (name, knobs) in [
        ("ppo", json!({"max_completion_length": 8, "num_ppo_epochs": 3, "max_kl": 0.05})),
        ("grpo", json!({"num_generations": 6, "max_completion_length": 8, "max_kl": 0.05})),
        ("rloo", json!({"num_generations": 6, "max_completion_length": 8, "max_kl": 0.05, "beta": 0})),
    ] {
        let task = stage.task(name, knobs, training(40, 4));
        let (adapter, recorder) = stage.finish(&task, &prompts(4), None);
        let kl = figures(&recorder, "objective/kl");
        let (last, before) = kl.split_last().unwrap();
        assert!(*last > 0.05 && before.iter().all(|kl| *kl <= 0.05) && kl.len() < 40, "{name}: {kl:?}");
        let said = recorder.messages.last().unwrap();
        assert!(said.starts_with(&format!("stopped early at step {}", kl.len())) && said.contains("0.05"), "{said}");
        let [.., earlier, end] = recorder.snapshots.as_slice() else { panic!("{name}") };
        assert_eq!(end.files[1].1, earlier.files[1].1, "{name}: the last step learnt");
        assert_eq!(end.files[1].1, adapter.weights);
        // One that is over stays over.
        let (again, rest) = stage.finish(&task, &prompts(4), Some(end));
        assert!(again == adapter && rest.metrics.is_empty(), "{name}");
    }
}

/// Silent on answers that begin with a multiple of this.
struct Silent {
    every: u32,
}

impl Reward for Silent {
    fn rewards(&self, answers: &[Answer]) -> anyhow::Result<Vec<Result<f64, Ungraded>>> {
        let is_silent = |answer: &Answer| answer.completion.ids[0].is_multiple_of(self.every);
        let one = |answer: &Answer| match is_silent(answer) {
            true => Err(Ungraded("no word".into())),
            false => Ok(even(answer.completion)),
        };
        Ok(answers.iter().map(one).collect())
    }
}

/// Completions without a reward are left out of their group and counted; too many of them fail the run.
#[test]
fn missing_rewards_are_left_out_up_to_a_share() {
    let stage = Stage::new();
    let training = json!({"n_epochs": 3, "batch_size": 2, "learning_rate": 1e-2, "max_seq_len": 64});
    let ran = |every: u32, knobs: Value| {
        let mut all = json!({"num_generations": 4, "max_completion_length": 4});
        all.as_object_mut().unwrap().extend(knobs.as_object().unwrap().clone());
        let (task, mut recorder) = (stage.task("grpo", all, training.clone()), Recorder::default());
        let ended = stage.run(&Silent { every }, &task, &prompts(4), None, &mut recorder);
        (ended, recorder)
    };
    let (ended, recorder) = ran(3, json!({"max_ungraded": 1.0}));
    assert!(matches!(ended.unwrap(), Outcome::Finished { .. }));
    let shares = figures(&recorder, "frac_ungraded");
    assert!(shares.iter().any(|share| *share > 0.0 && *share < 1.0), "{shares:?}");
    let warned = recorder.messages.iter().filter(|text| text.contains("completions have no reward: no word")).count();
    assert_eq!(warned, shares.iter().filter(|share| **share > 0.0).count());
    // A group of which nobody says anything teaches nothing, and harms nothing.
    let (ended, recorder) = ran(1, json!({"max_ungraded": 1.0}));
    assert!(matches!(ended.unwrap(), Outcome::Finished { .. }));
    assert!(recorder.metrics.iter().all(|metrics| metrics.grad_norm == Some(0.0)));
    let (ended, _) = ran(1, json!({}));
    match ended {
        Err(TrainError::Ungraded(text)) => {
            assert_eq!(text, "8 of 8 completions have no reward: no word. max_ungraded is 0.5")
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

/// Says nothing of some completions.
struct Doubtful(fn(usize) -> Option<f64>);

impl Reward for Doubtful {
    fn rewards(&self, answers: &[Answer]) -> anyhow::Result<Vec<Result<f64, Ungraded>>> {
        let one = |(i, one): (usize, &Answer)| match (self.0)(i) {
            Some(odd) => Ok(odd),
            None if i % 2 == 0 => Ok(even(one.completion)),
            None => Err(Ungraded("nobody answered".to_owned())),
        };
        Ok(answers.iter().enumerate().map(one).collect())
    }
}

/// What has no reward is left out and counted, up to half of a step.
#[test]
fn rewards_that_are_none_are_left_out() {
    let stage = Stage::new();
    for (name, knobs) in [
        ("ppo", json!({"max_completion_length": 8})),
        ("grpo", json!({"num_generations": 2, "max_completion_length": 8, "beta": 0.1})),
        ("rloo", json!({"num_generations": 2, "max_completion_length": 8})),
    ] {
        let task = stage.task(name, knobs, training(3, 8));
        let run = |reward: &dyn Reward| {
            let mut recorder = Recorder::default();
            let ended = stage.run(reward, &task, &prompts(8), None, &mut recorder);
            (ended, recorder)
        };
        // Every second has none, and one of those that are left is no number.
        let (ended, recorder) = run(&Doubtful(|_| None));
        assert!(matches!(ended, Ok(Outcome::Finished { .. })), "{name}: {ended:?}");
        assert_eq!(figures(&recorder, "frac_ungraded"), [0.5; 3], "{name}");
        assert!(recorder.losses().iter().chain(&recorder.norms()).all(|x| x.is_finite()), "{name}");
        let said = recorder.messages.first().unwrap();
        assert!(
            said.starts_with("step 1: ") && said.ends_with("completions have no reward: nobody answered"),
            "{said}"
        );
        let (ended, _) = run(&Doubtful(|i| (i == 4).then_some(f64::NAN)));
        let Err(TrainError::Ungraded(text)) = ended else { panic!("{name}: {ended:?}") };
        assert!(text.ends_with("have no reward: nobody answered. max_ungraded is 0.5"), "{text}");
        let (ended, recorder) = run(&Doubtful(|i| Some(if i == 4 { f64::NAN } else { (i % 3) as f64 })));
        assert!(matches!(ended, Ok(Outcome::Finished { .. })), "{name}: {ended:?}");
        assert!(recorder.messages[0].ends_with("the reward is NaN"), "{:?}", recorder.messages);
        assert!(recorder.metrics.iter().all(|metrics| metrics.figures["reward"].is_finite()), "{name}");
    }
    let task = stage.task("grpo", json!({"num_generations": 2, "max_completion_length": 8}), training(1, 8));
    let ended = stage.run(&LikesEven, &task, &prompts(8), None, &mut Recorder::default());
    assert!(matches!(ended, Ok(Outcome::Finished { .. })), "{ended:?}");
}

#[test]
fn what_a_request_may_ask_is_checked_by_field() {
    let grader = json!({"type": "json_valid", "name": "j", "input": "{{sample.output_text}}"});
    for (field, value, limit) in [
        ("num_ppo_epochs", json!(0), "1 to 16"),
        ("max_completion_length", json!(0), "1 to 65536"),
        ("temperature", json!(0), "above 0, to 2"),
        ("kl_coef", json!(-1), "0 to 100"),
        ("kl_target", json!(0), "above 0, to 1000"),
        ("kl_horizon", json!(0), "1 to 1000000000"),
        ("max_kl", json!(0), "above 0"),
        ("max_ungraded", json!(1.5), "0 to 1"),
        ("gamma", json!(1.1), "0 to 1"),
        ("lam", json!(-0.1), "0 to 1"),
        ("cliprange", json!(1), "above 0, below 1"),
        ("cliprange_value", json!(0), "above 0, to 1000"),
        ("vf_coef", json!(101), "0 to 100"),
        ("vf_learning_rate_multiplier", json!(0), "above 0, to 1000"),
        ("missing_eos_penalty", json!(-1), "0 to 100"),
        ("num_generations", json!(2), "known are"),
    ] {
        let method = json!({"type": "ppo", "ppo": {"grader": grader, "hyperparameters": {field: value}}});
        let error = ObjectiveSpec::from_json(&method).unwrap_err();
        assert_eq!(error.param, format!("method.ppo.hyperparameters.{field}"), "{error}");
        assert!(error.message.contains(limit), "{error}");
    }
    let knobs = json!({"kl_coef": 0, "kl_target": 1});
    let method = json!({"type": "ppo", "ppo": {"grader": grader, "hyperparameters": knobs}});
    assert_eq!(ObjectiveSpec::from_json(&method).unwrap_err().param, "method.ppo.hyperparameters.kl_coef");
    let method = json!({"type": "grpo", "grpo": {"grader": grader, "hyperparameters": {"max_kl": -1}}});
    assert_eq!(ObjectiveSpec::from_json(&method).unwrap_err().param, "method.grpo.hyperparameters.max_kl");
}
