//! Mixtures of experts and UniPELT against PyTorch: `tests/fixtures/experts/make.py` says how the numbers were made.

use std::{cell::RefCell, collections::BTreeSet, fs, path::PathBuf, sync::Arc};

use attune::{
    data::{Example, Judged, Pair, Row, Sampled},
    domain::{ObjectiveSpec, Site, TaskHead},
    methods::{self, AdapterFiles, Trainable},
    model::{
        At, Base, Batch, Hook, Keep, Sequence, Tape,
        mlp::{Mlp, Products},
        ops::Activation,
    },
    objectives::{self, Models, supervised},
};
use candle_core::{Device, Tensor, backprop::GradStore, safetensors};
use serde_json::{Value, json};

use crate::support::{
    tiny::{Random, Tiny},
    training::{From, create, finish, rows as random_rows, spec},
};

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

fn json_of(path: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(path)).unwrap()).unwrap()
}

fn adapter(method: &str) -> AdapterFiles {
    let file = |name| fs::read(fixture("experts").join(method).join(name)).unwrap();
    AdapterFiles { config: file("adapter_config.json"), weights: file("adapter_model.safetensors") }
}

/// The golden batch without its padding.
fn rows() -> Vec<Example> {
    let batch = json_of("golden/batch.json");
    let table = |key: &str| -> Vec<Vec<i64>> { serde_json::from_value(batch[key].clone()).unwrap() };
    let (ids, labels, masks) = (table("input_ids"), table("labels"), table("attention_mask"));
    let row = |i: usize| {
        let (ids, labels, mask) = (&ids[i], &labels[i], &masks[i]);
        let length = mask.iter().sum::<i64>() as usize;
        let labels = labels[..length].iter().map(|label| u32::try_from(*label).ok()).collect();
        Example { line: i as u64 + 1, ids: ids[..length].iter().map(|id| *id as u32).collect(), labels }
    };
    (0..ids.len()).map(row).collect()
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn number(x: &Tensor) -> f64 {
    f64::from(x.to_scalar::<f32>().unwrap())
}

/// Hidden rows and the mean loss per trained token.
fn forward(base: &Base, rows: &[Example], hook: &Arc<dyn Hook>, train: Option<u64>) -> (Tensor, Tensor) {
    let sequence = |row| -> Sequence { Sequence { tokens: row, branches: &[], hook: Some(hook.clone()), cache: None } };
    let sequences = rows.iter().map(|row| sequence(row.ids.as_slice())).collect();
    let hidden = base.forward(&mut Batch { sequences, train }).unwrap();
    let targets = supervised::targets(rows.iter().map(|row| row.labels.as_slice()));
    let loss = base.cross_entropy(&hidden, &targets, Some(hook.as_ref())).unwrap().loss;
    let trained: usize = rows.iter().map(Example::trained).sum();
    (hidden, loss.affine(1.0 / trained as f64, 0.0).unwrap())
}

#[test]
fn scores_losses_and_first_gradients_are_those_of_pytorch() {
    let base = Base::open("golden", &fixture("golden/base")).unwrap();
    for name in ["mixlora", "mola", "loramoe", "adamole", "unipelt"] {
        let (files, rows) = (adapter(name), rows());
        let expected =
            safetensors::load(fixture(&format!("experts/{name}/expected.safetensors")), &Device::Cpu).unwrap();
        let numbers = json_of(&format!("experts/{name}/expected.json"));

        let serving = methods::load(&files, &base).unwrap();
        let (hidden, _) = forward(&base, &rows, &serving, None);
        let logits = base.logits(&hidden, Some(serving.as_ref())).unwrap();
        let apart = largest(&(logits - &expected["logits"]).unwrap());
        assert!(apart < 1e-5, "{name}: scores {apart}");

        let method = methods::resume(&files, &base).unwrap();
        let hook = method.hook(Some(1)).unwrap();
        let (_, loss) = forward(&base, &rows, &hook, Some(1));
        assert!((number(&loss) - numbers["loss"].as_f64().unwrap()).abs() < 1e-5, "{name}: {loss}");
        let penalty = hook.penalty().unwrap();
        let found = penalty.as_ref().map_or(0.0, number);
        assert!((found - numbers["penalty"].as_f64().unwrap()).abs() < 1e-6, "{name}: penalty {found}");
        assert_eq!(penalty.is_some(), name != "unipelt");
        let objective = penalty.map_or(loss.clone(), |penalty| (loss + penalty).unwrap());
        let gradients = objective.backward().unwrap();
        assert_eq!(method.variables().len() + 1, expected.len());
        for (variable, var) in method.variables() {
            let expected = &expected[&format!("grad.{variable}")];
            let gradient = gradients.get(var.as_tensor()).unwrap_or_else(|| panic!("{variable} has no gradient"));
            let apart = largest(&(gradient - expected).unwrap());
            assert!(apart < 1e-6 + 1e-5 * largest(expected), "{name}: {variable} {apart}");
        }
    }
}

fn tiny() -> Arc<Base> {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    Base::open("tiny", dir.path()).unwrap()
}

/// A method with random values.
fn shaken(base: &Base, adapter: Value, seed: u64) -> Box<dyn Trainable> {
    let method = create(&spec(base, adapter, json!({})).adapter, base, 1);
    let mut random = Random(seed);
    for (_, variable) in method.variables() {
        let values: Vec<f32> = (0..variable.elem_count()).map(|_| 0.2 * random.normal()).collect();
        variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    method
}

/// Every expert's whole block, computed by itself from dense weights: what the shared products must come to.
#[test]
fn mixlora_is_a_mixture_of_whole_blocks() {
    let base = tiny();
    let method = shaken(&base, json!({"type": "moe_lora", "num_experts": 4, "top_k": 3, "r": 2, "alpha": 5}), 3);
    let variables = method.variables();
    let get = |name: String| variables.iter().find(|(n, _)| *n == name).unwrap().1.as_tensor().clone();
    let mut random = Random(9);
    let x: Vec<f32> = (0..6 * 64).map(|_| random.normal()).collect();
    let x = Tensor::from_vec(x, (6, 64), &Device::Cpu).unwrap();
    let module = "mixlora.layers.1.mlp";
    let p = x.matmul(&get(format!("{module}.moe_gate.weight")).t().unwrap()).unwrap();
    let p = candle_nn::ops::softmax(&p, 1).unwrap().to_vec2::<f32>().unwrap();
    let block = |e: usize| {
        let linear = |site: Site, x: &Tensor| {
            let holder = format!("mixlora.layers.1.{}.experts.{e}", site.module());
            let (a, b) = (get(format!("{holder}.lora_A.weight")), get(format!("{holder}.lora_B.weight")));
            let delta = b.matmul(&a).unwrap().affine(2.5, 0.0).unwrap();
            x.matmul(&(base.linear(1, site).dequantize().unwrap() + delta).unwrap().t().unwrap()).unwrap()
        };
        let gated = (linear(Site::Gate, &x).silu().unwrap() * linear(Site::Up, &x)).unwrap();
        linear(Site::Down, &gated).to_vec2::<f32>().unwrap()
    };
    let blocks: Vec<_> = (0..4).map(block).collect();
    let hook = method.hook(None).unwrap();
    let at = At { layer: 1, lengths: &[6], train: None };
    let [gate, up, down] = [Site::Gate, Site::Up, Site::Down].map(|site| base.linear(1, site).clone());
    let frozen = Mlp { gate, up, down, activation: Activation::Silu };
    let mlp = |x: &Tensor| {
        let (gate, up) = (frozen.gate.forward(x).unwrap(), frozen.up.forward(x).unwrap());
        let z = frozen.activate(&gate, &up).unwrap();
        let replaced = hook.mlp(at, x, &Products { gate, up, z }, &frozen).unwrap().unwrap();
        let y = frozen.down.forward(&replaced.z).unwrap();
        (replaced.finish)(y).unwrap().to_vec2::<f32>().unwrap()
    };
    let found = mlp(&x);
    for row in 0..6 {
        let least = (0..4).min_by(|a, b| p[row][*a].total_cmp(&p[row][*b])).unwrap();
        let chosen: Vec<usize> = (0..4).filter(|e| *e != least).collect();
        let sum: f32 = chosen.iter().map(|e| p[row][*e]).sum();
        for (i, found) in found[row].iter().enumerate() {
            let expected: f32 = chosen.iter().map(|e| p[row][*e] / sum * blocks[*e][row][i]).sum();
            assert!((found - expected).abs() < 1e-4 * (1.0 + expected.abs()), "row {row}: {found} {expected}");
        }
        // A row alone: the same bits, whatever stood beside it.
        assert_eq!(mlp(&x.narrow(0, row, 1).unwrap())[0], found[row]);
    }
}

#[test]
fn figures_and_penalty_are_of_one_training_pass() {
    let base = tiny();
    let method = shaken(&base, json!({"type": "moe_lora", "variant": "mola", "num_experts": 3, "r": 2}), 4);
    let rows = random_rows(&[9, 4], 2);
    let figures = |train: Option<u64>| {
        let hook = method.hook(train).unwrap();
        forward(&base, &rows, &hook, train);
        (hook.figures(), hook.penalty().unwrap().map(|p| number(&p)))
    };
    let (first, penalty) = figures(Some(1));
    assert_eq!((first.clone(), penalty), figures(Some(1)));
    let names: Vec<&str> = first.iter().map(|(name, _)| name.as_str()).collect();
    let shares = ["expert_share.0", "expert_share.1", "expert_share.2"];
    assert_eq!(names, [["router_entropy", "experts_per_token"].as_slice(), &shares].concat());
    let value = |name: &str| first.iter().find(|(n, _)| n == name).unwrap().1;
    assert!((shares.map(value).iter().sum::<f64>() - 1.0).abs() < 1e-9);
    assert_eq!(value("experts_per_token"), 2.0);
    assert!(value("router_entropy") > 0.1 && value("router_entropy") < 3f64.ln());
    // E · Σ f P lies between 0 and E·k; 1e-3 is the coefficient.
    assert!(penalty.is_some_and(|penalty| penalty > 1e-3 && penalty < 6e-3), "{penalty:?}");
    // The pass's, not its random numbers': dropout is off under most objectives. Nothing is noted while serving.
    assert_eq!(figures(None), (first, penalty));
    let serving = methods::load(&method.export().unwrap(), &base).unwrap();
    forward(&base, &rows, &serving, None);
    assert!(serving.figures().is_empty() && serving.penalty().unwrap().is_none());
}

/// Every objective's passes train the method's penalty: that of the texts the policy is trained on, and no others.
#[test]
fn the_balance_is_part_of_every_objective() {
    let base = tiny();
    let adapter = json!({"type": "moe_lora", "variant": "loramoe", "num_experts": 3, "r": 2, "blc_weight": 0.5});
    let method = shaken(&base, adapter.clone(), 8);
    let texts = random_rows(&[9, 5, 7, 6], 3);
    let pair = |i: usize| {
        Row::Pair(Pair { chosen: texts[i].clone(), rejected: texts[i + 2].clone(), margin: 0.0, probability: 1.0 })
    };
    let sampled = |text: &Example| {
        let n = text.trained();
        let example = text.clone();
        Row::Sampled(Sampled {
            example,
            advantage: 0.5,
            temperature: 1.0,
            old: None,
            reference: vec![0.1; n],
            worth: Vec::new(),
        })
    };
    let judged = |text: &Example| Row::Judged(Judged { example: text.clone(), is_desirable: true });
    let grader = json!({"type": "json_valid", "name": "json", "input": "{{sample.output_text}}"});
    let expected = {
        let hook = method.hook(Some(1)).unwrap();
        forward(&base, &texts, &hook, Some(1));
        number(&hook.penalty().unwrap().unwrap())
    };
    for name in ["supervised", "dpo", "ipo", "orpo", "simpo", "kto", "reward_model", "grpo", "rloo", "reinforcement"] {
        let (rows, knobs): (Vec<Row>, Value) = match name {
            "supervised" => (texts.iter().cloned().map(Row::from).collect(), json!({})),
            "kto" => (texts.iter().map(judged).collect(), json!({})),
            "grpo" | "rloo" | "reinforcement" => (texts.iter().map(sampled).collect(), json!({"grader": grader})),
            _ => (vec![pair(0), pair(1)], json!({})),
        };
        let spec = ObjectiveSpec::from_json(&json!({"type": name, name: knobs})).unwrap();
        let scored = methods::score::fresh(shaken(&base, adapter.clone(), 8), TaskHead::Score, &base, 3).unwrap();
        let method = if name == "reward_model" { scored.as_ref() } else { method.as_ref() };
        for keep in [Keep::Everything, Keep::LayerInputs] {
            let tape = RefCell::new(Tape::new(keep));
            let models = Models { base: &base, method, reference: None, train: Some(1), tape: &tape, limit: 64 };
            let found = objectives::of(&spec).pass(&models, &rows.iter().collect::<Vec<_>>()).unwrap();
            let penalty = found.hook.penalty().unwrap().unwrap_or_else(|| panic!("{name} has no penalty"));
            assert!((number(&penalty) / expected - 1.0).abs() < 1e-5, "{name}: {penalty} {expected}");
            assert!(found.hook.figures().iter().any(|(name, _)| name == "router_entropy"));
            let mut reached = BTreeSet::new();
            let gradient = |found: &GradStore| {
                let there = method.variables().into_iter().filter(|(_, variable)| found.get(variable).is_some());
                reached.extend(there.map(|(name, _)| name));
                Ok(())
            };
            tape.into_inner().backward(&base, &penalty, gradient).unwrap();
            let routers = reached.iter().filter(|name| name.ends_with("moe_gate.weight"));
            assert_eq!(routers.count(), base.info.layers * 3, "{name} {keep:?}");
        }
    }
}

/// Jitter moves what the router sees and nothing else: where all experts are the same one, no output moves.
#[test]
fn jitter_is_the_routers_alone() {
    let base = tiny();
    for variant in ["mixlora", "mola", "loramoe", "adamole"] {
        let knobs = json!({"type": "moe_lora", "variant": variant, "num_experts": 3, "r": 2, "jitter_noise": 0.9});
        let method = shaken(&base, knobs, 7);
        let hidden = |train| {
            let hook = method.hook(train).unwrap();
            forward(&base, &random_rows(&[9, 4], 2), &hook, train).0
        };
        assert!(largest(&(hidden(Some(1)) - hidden(None)).unwrap()) > 1e-3, "{variant}: no jitter");
        assert_eq!(largest(&(hidden(Some(1)) - hidden(Some(1))).unwrap()), 0.0);
        let variables = method.variables();
        for (name, variable) in &variables {
            let Some((module, rest)) = name.split_once(".experts.") else { continue };
            let first = format!("{module}.experts.0{}", &rest[1..]);
            let (_, first) = variables.iter().find(|(name, _)| *name == first).unwrap();
            variable.set(&first.as_tensor().copy().unwrap()).unwrap();
        }
        let apart = largest(&(hidden(Some(1)) - hidden(None)).unwrap());
        assert!(apart < 5e-5, "{variant}: {apart}");
    }
}

/// A router that sends every row to one expert learns to share, and the steps' figures show it.
#[test]
fn the_balance_spreads_rows_over_experts() {
    let base = tiny();
    let adapter = |coefficient: f64| {
        json!({"type": "moe_lora", "num_experts": 4, "r": 2, "target_modules": ["up_proj"],
               "router_aux_loss_coef": coefficient})
    };
    let entropy = |coefficient: f64| {
        let training = json!({"n_epochs": 40, "batch_size": 3, "learning_rate": 2e-2});
        let spec = spec(&base, adapter(coefficient), training);
        let start = shaken(&base, adapter(coefficient), 6).export().unwrap();
        let from = From { start: Some(&start), ..From::default() };
        let (_, recorder) = finish(&base, &spec, &random_rows(&[12, 9, 14], 8), from);
        let last = &recorder.metrics[39].figures;
        assert_eq!(last.contains_key("penalty"), coefficient > 0.0);
        let shares: Vec<f64> = (0..4).map(|e| last[&format!("expert_share.{e}")]).collect();
        shares.iter().map(|share| (share - 0.25).powi(2)).sum::<f64>()
    };
    let (without, with) = (entropy(0.0), entropy(1.0));
    assert!(with < 0.5 * without, "{with} {without}");
}

#[test]
fn unipelts_gates_stand_at_each_token() {
    let base = tiny();
    let adapter = json!({"type": "unipelt", "prefix_length": 3, "bottleneck_size": 8, "reduction_factor": 8});
    let method = shaken(&base, adapter, 5);
    let rows = random_rows(&[9], 2);
    let mut longer = rows[0].clone();
    longer.ids[8] ^= 1;
    let hook = method.hook(None).unwrap();
    let (a, b) = (forward(&base, &rows, &hook, None).0, forward(&base, &[longer], &hook, None).0);
    let (a, b) = (a.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
    assert_eq!(a[..8], b[..8], "an earlier token sees a later one");
    assert_ne!(a[8], b[8]);
}
