//! What every method promises, on a dense and on a quantised base. A new method is one row in `table`.

use std::sync::Arc;

use attune::{
    domain::{Control, DoraSpec, MethodSpec, MoeLoraSpec, Site, TaskHead, TrainSpec, WordToken},
    methods::{self, AdapterFiles, MethodError, Trainable},
    model::{Base, Batch, Held, Hook},
    trainer::Outcome,
};
use candle_core::{Device, Tensor, quantized::GgmlDType, safetensors};
use serde_json::{Value, json};

use crate::support::{
    quantised,
    tiny::{Random, Tiny},
    training::{From, Recorder, are_near, create, finish, method, rows, run, sequence, spec},
};

/// A method, and what it cannot promise.
struct Row {
    adapter: Value,
    /// A fresh adapter is the base itself.
    fresh_is_base: bool,
    /// A fresh adapter depends on the seed.
    is_random: bool,
    /// The learning rate at which 30 steps leave at most this share of the loss.
    rate: f64,
    left: f64,
}

fn table() -> Vec<Row> {
    let lora = |adapter| Row { adapter, fresh_is_base: true, is_random: true, rate: 1e-2, left: 0.7 };
    let ia3 = |adapter| Row { adapter, fresh_is_base: true, is_random: false, rate: 0.1, left: 0.7 };
    let prompt = |rate, adapter| Row { adapter, fresh_is_base: false, is_random: true, rate, left: 0.7 };
    vec![
        lora(json!({"type": "lora", "r": 3, "alpha": 7})),
        lora(json!({"type": "lora", "r": 4, "alpha": 6, "use_rslora": true, "init_lora_weights": "gaussian",
                    "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"1.self_attn.q_proj": 2},
                    "alpha_pattern": {"v_proj": 11}, "layers_to_transform": [0, 1]})),
        lora(json!({"type": "lora", "r": 2, "alpha": 5, "target_modules": r".*_proj", "exclude_modules": ["o_proj"]})),
        lora(json!({"type": "lora", "r": 3, "alpha": 7, "loraplus_lr_ratio": 8, "dropout": 0.1})),
        lora(json!({"type": "dora", "r": 3, "alpha": 7, "dropout": 0.1, "rank_pattern": {"q_proj": 2}})),
        lora(json!({"type": "lora", "r": 3, "alpha": 7, "dropout": 0.2})),
        lora(json!({"type": "adalora", "init_r": 4, "target_r": 2, "alpha": 7, "dropout": 0.1})),
        // Few ranks on few linears: slower than the others on a base in 4 bits.
        Row {
            rate: 3e-2,
            ..lora(
                json!({"type": "adalora", "init_r": 3, "target_r": 1, "alpha": 9, "orth_reg_weight": 0.1, "deltaT": 2,
                    "target_modules": r".*\.(q|v|down)_proj", "exclude_modules": ["0.mlp.down_proj"]}),
            )
        },
        ia3(json!({"type": "ia3"})),
        ia3(json!({"type": "ia3", "target_modules": "all-linear", "feedforward_modules": ".*(up|o|down)_proj"})),
        lora(json!({"type": "lora", "r": 3, "alpha": 7, "target_modules": ["q_proj", "embed_tokens", "lm_head"]})),
        lora(json!({"type": "dora", "r": 3, "alpha": 7, "trainable_token_indices": [33, 64]})),
        prompt(0.1, json!({"type": "prompt_tuning", "num_virtual_tokens": 11})),
        prompt(0.1, json!({"type": "prompt_tuning", "num_virtual_tokens": 9, "prompt_tuning_init": "RANDOM"})),
        prompt(0.03, json!({"type": "p_tuning", "num_virtual_tokens": 10, "encoder_hidden_size": 24})),
        prompt(
            0.03,
            json!({"type": "p_tuning", "num_virtual_tokens": 6, "encoder_reparameterization_type": "LSTM",
                      "encoder_hidden_size": 12, "encoder_num_layers": 2, "encoder_dropout": 0.1}),
        ),
        prompt(0.1, json!({"type": "prefix_tuning", "num_virtual_tokens": 7})),
        prompt(0.03, json!({"type": "prefix_tuning", "num_virtual_tokens": 5, "prefix_projection": true})),
        prompt(0.1, json!({"type": "p_tuning_v2", "init_weights": "random"})),
        lora(json!({"type": "moe_lora", "num_experts": 3, "r": 2, "alpha": 5, "lora_dropout": 0.05,
                    "jitter_noise": 0.02})),
        lora(json!({"type": "moe_lora", "variant": "mola", "experts_per_layer": [2, 3], "r": 2, "alpha": 5,
                    "target_modules": ["q_proj", "v_proj", "down_proj"], "router_aux_loss_coef": 0.02})),
        lora(json!({"type": "moe_lora", "variant": "loramoe", "num_experts": 3, "r": 2, "alpha": 5,
                    "blc_weight": 0.1, "lora_dropout": 0.05, "jitter_noise": 0.02})),
        lora(json!({"type": "moe_lora", "variant": "adamole", "num_experts": 3, "r": 2, "alpha": 5,
                    "router_init_range": 0.5, "target_modules": ["k_proj", "o_proj", "up_proj"]})),
        Row {
            adapter: json!({"type": "unipelt", "lora_r": 3, "prefix_length": 4, "bottleneck_size": 12,
                            "reduction_factor": 8}),
            is_random: true,
            fresh_is_base: false,
            rate: 1e-2,
            left: 0.7,
        },
        prompt(
            1e-2,
            json!({"type": "xlora", "adapters": ["a", "b"], "use_trainable_adapters": true, "xlora_depth": 2,
                   "xlora_size": 12, "scaling_pass_value": 0.3, "global_scaling_weight": 1.4}),
        ),
        // A gate over three random adapters.
        Row {
            left: 0.98,
            ..prompt(
                0.03,
                json!({"type": "xlora", "adapters": ["a", "b", "c"], "layerwise_scalings": true, "top_k_lora": 2,
                       "softmax_temperature": 0.8}),
            )
        },
        lora(json!({"type": "qlora", "r": 3, "alpha": 4})),
        // The base only up to rounding: its products are another op's.
        Row { fresh_is_base: false, is_random: false, rate: 3e-3, ..lora(json!({"type": "full"})) },
        // The base only up to rounding: `pissa.rs` has more.
        Row {
            fresh_is_base: false,
            ..lora(json!({"type": "lora", "r": 3, "alpha": 7, "init_lora_weights": "pissa_niter_1"}))
        },
    ]
}

fn bases() -> Vec<Arc<Base>> {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny { intermediate: 128, ..Tiny::default() };
    tiny.write(dir.path());
    let gguf = dir.path().join("tiny.gguf");
    quantised::write(&tiny, &gguf, GgmlDType::Q4_1);
    vec![
        Base::open("dense", dir.path()).unwrap(),
        Base::open("quantised", &gguf).unwrap(),
        Base::open_held("nf4", dir.path(), Held::Nf4Dq).unwrap(),
    ]
}

/// Every method on every base.
fn each(mut check: impl FnMut(&Row, &MethodSpec, &Arc<Base>)) {
    for base in bases() {
        for row in table() {
            let spec = method(&base, &row.adapter);
            let is_dense = base.info.storage == "F32";
            let is_out_of_place =
                if is_dense { matches!(spec, MethodSpec::Qlora(_)) } else { matches!(spec, MethodSpec::Full(_)) };
            if is_out_of_place {
                assert_eq!(spec.check(&base.info).unwrap_err().param, "adapter.type");
                continue;
            }
            spec.check(&base.info).unwrap();
            check(&row, &spec, &base);
        }
    }
}

/// Tokens and the adapter they carry.
type Carried<'a> = (&'a [u32], Option<Arc<dyn Hook>>);

fn hidden(base: &Base, sequences: &[Carried]) -> Vec<Vec<f32>> {
    let sequences = sequences.iter().map(|(tokens, hook)| sequence(tokens, hook.as_ref(), None));
    base.forward(&mut Batch { sequences: sequences.collect(), train: None }).unwrap().to_vec2().unwrap()
}

fn with(base: &Base, hook: Arc<dyn Hook>) -> Vec<Vec<f32>> {
    hidden(base, &[(&TOKENS, Some(hook))])
}

const TOKENS: [u32; 9] = [7, 250, 33, 101, 5, 64, 64, 12, 199];

/// Random values in every variable, so that no factor of zero or one hides anything.
fn shake(method: &dyn Trainable, seed: u64) {
    let mut random = Random(seed);
    for (_, variable) in method.variables() {
        let values: Vec<f32> = (0..variable.elem_count()).map(|_| 0.2 * random.normal()).collect();
        variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap()).unwrap();
    }
}

fn shaken(spec: &MethodSpec, base: &Base, seed: u64) -> Box<dyn Trainable> {
    let method = create(spec, base, 1);
    shake(method.as_ref(), seed);
    method
}

#[test]
fn a_fresh_adapter_is_the_base_and_comes_from_its_seed() {
    each(|row, spec, base| {
        let fresh = create(spec, base, 3);
        let alone = hidden(base, &[(&TOKENS, None)]);
        assert_eq!(with(base, fresh.hook(None).unwrap()) == alone, row.fresh_is_base);
        assert_ne!(with(base, shaken(spec, base, 4).hook(None).unwrap()), alone);
        let files = |seed| create(spec, base, seed).export().unwrap();
        assert_eq!(files(3), fresh.export().unwrap());
        assert_eq!(files(4).weights != files(3).weights, row.is_random);
        let count: usize = fresh.variables().iter().map(|(_, variable)| variable.elem_count()).sum();
        assert_eq!(count as u64, spec.trainable(&base.info));
    });
}

/// `y = x (W + s·BA)ᵀ`, with s from the spec and W made dense.
#[test]
fn lora_is_as_strong_as_alpha_by_rank() {
    each(|_, spec, base| {
        let lora = match spec {
            MethodSpec::Lora(lora) => lora,
            MethodSpec::Qlora(qlora) => &qlora.lora,
            _ => return,
        };
        if lora.is_pissa() {
            return;
        }
        let method = shaken(spec, base, 8);
        let variables = method.variables();
        let targets = lora.targets(&base.info).unwrap();
        assert!(targets.iter().all(|target| target.scale != 1.0));
        let pairs = targets.iter().zip(variables.chunks(2));
        for (target, pair) in pairs.filter(|(target, _)| Site::LAYER.contains(&target.site)) {
            let path = target.site.path(target.layer);
            assert_eq!(pair[0].0, format!("base_model.model.{path}.lora_A.weight"));
            assert_eq!(pair[1].0, format!("base_model.model.{path}.lora_B.weight"));
            let linear = base.linear(target.layer, target.site);
            let mut random = Random(9);
            let x: Vec<f32> = (0..5 * linear.shape().1).map(|_| random.normal()).collect();
            let x = Tensor::from_vec(x, (5, linear.shape().1), &Device::Cpu).unwrap();
            let delta = pair[1].1.matmul(&pair[0].1).unwrap().affine(target.scale, 0.0).unwrap();
            let merged = (linear.dequantize().unwrap() + delta).unwrap();
            let expected = x.matmul(&merged.t().unwrap()).unwrap();
            let at = attune::model::At { layer: target.layer, lengths: &[5], train: None };
            let found = method.hook(None).unwrap().linear(at, target.site, &x, linear).unwrap();
            let apart = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(apart.to_scalar::<f32>().unwrap() < 2e-4, "{path}: {apart}");
        }
    });
}

#[test]
fn a_stored_adapter_is_the_same_to_the_bit() {
    each(|_, spec, base| {
        let method = shaken(spec, base, 5);
        let files = method.export().unwrap();
        let (stored, live) = (with(base, methods::load(&files, base).unwrap()), with(base, method.hook(None).unwrap()));
        // Served experts and gates are summed in an order of their own.
        let limit = if matches!(spec, MethodSpec::MoeLora(_) | MethodSpec::Unipelt(_)) { 1e-5 } else { 0.0 };
        assert!(are_near(&stored, &live, limit), "{} over {} is another once stored", spec.type_name(), base.info.id);
        let resumed = methods::resume(&files, base).unwrap();
        let (again, there) = (resumed.export().unwrap(), methods::spec_of(&files).unwrap());
        assert_eq!(again.weights, files.weights);
        let continued = methods::continued(&files).unwrap();
        assert_eq!(methods::spec_of(&again).unwrap(), continued);
        assert!(again == files || continued != there, "the config has changed");
        // PiSSA is stored as LoRA of twice the rank.
        if !matches!(spec, MethodSpec::Lora(lora) if lora.is_pissa()) {
            // The config stands for the same modules, ranks and scales.
            assert_eq!((targets(&there, base), there.virtual_tokens()), (targets(spec, base), spec.virtual_tokens()));
        }
        // What is not in the file: the preset, and what the base is held in.
        let name = match spec {
            MethodSpec::PTuningV2(_) => "prefix_tuning",
            MethodSpec::Qlora(_) => "lora",
            _ => spec.type_name(),
        };
        assert_eq!(there.type_name(), name);
    });
}

/// The modules that a spec changes, each with how.
fn targets(spec: &MethodSpec, base: &Base) -> String {
    let base = &base.info;
    match spec {
        MethodSpec::Lora(spec) | MethodSpec::Dora(DoraSpec(spec)) => format!("{:?}", spec.targets(base).unwrap()),
        MethodSpec::Qlora(spec) => format!("{:?}", spec.lora.targets(base).unwrap()),
        MethodSpec::AdaLora(spec) => format!("{:?} {} {}", spec.targets(base).unwrap(), spec.init_r, spec.lora_alpha),
        MethodSpec::Ia3(spec) => format!("{:?}", spec.targets(base).unwrap()),
        MethodSpec::MoeLora(spec) => {
            let targets = spec.targets(base).unwrap();
            let rest = MoeLoraSpec { target_modules: Default::default(), ..spec.clone() };
            format!("{targets:?} {rest:?}")
        }
        MethodSpec::Unipelt(spec) => format!("{spec:?}"),
        MethodSpec::Xlora(spec) => format!("{:?} {}", spec.linears(base), spec.experts.len()),
        _ => String::new(),
    }
}

#[test]
fn every_variable_learns_and_the_base_stays() {
    each(|row, _, base| {
        let rows = rows(&[9, 6, 12], 6);
        let spec: TrainSpec =
            spec(base, row.adapter.clone(), json!({"n_epochs": 30, "batch_size": 3, "learning_rate": row.rate}));
        let weights = || -> Vec<Vec<f32>> {
            base.info
                .linears()
                .chain([(0, Site::Head)])
                .map(|(layer, site)| base.linear(layer, site).dequantize().unwrap().flatten_all().unwrap())
                .map(|weight| weight.to_vec1().unwrap())
                .collect()
        };
        let before = weights();
        let (_, recorder) = finish(base, &spec, &rows, From::default());
        let losses = recorder.losses();
        assert!(losses[29] < row.left * losses[0], "{}: {losses:?}", row.adapter);
        assert!(before == weights(), "the base has changed");

        // After one step nothing is at its starting point's zeros any more: every gradient is there.
        let two = TrainSpec { training: attune::domain::Training { max_steps: Some(2), ..spec.training }, ..spec };
        let (_, recorder) = finish(base, &two, &rows, From::default());
        let moments = &recorder.snapshots.last().unwrap().files[3];
        assert_eq!(moments.0, "trainer.safetensors");
        let moments = safetensors::load_buffer(&moments.1, &Device::Cpu).unwrap();
        let variables = create(&two.adapter, base, 1).variables();
        if variables.iter().any(|(name, _)| name.contains("layers.")) {
            assert!(variables.iter().any(|(name, _)| name.contains("layers.0.")));
        }
        for (name, _) in variables {
            let largest = moments[&format!("m.{name}")].abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(largest.to_scalar::<f32>().unwrap() > 0.0, "{name} has no gradient");
        }
    });
}

/// Everything but the head is the method's, in the pass and in the files.
#[test]
fn a_head_leaves_the_method_alone() {
    let labels = || ["a", "b", "c"].map(str::to_owned).to_vec();
    let heads = [
        TaskHead::Score,
        TaskHead::Sequence { labels: labels() },
        TaskHead::Token { labels: labels(), word_token: WordToken::Last },
    ];
    let mut turn = 0;
    each(|_, spec, base| {
        // Each method over some base with each of them.
        let head = &heads[turn % 3];
        turn += 1;
        let plain = shaken(spec, base, 5);
        let scored = methods::score::fresh(shaken(spec, base, 5), head.clone(), base, 7).unwrap();
        assert_eq!(with(base, scored.hook(None).unwrap()), with(base, plain.hook(None).unwrap()));
        let files = scored.export().unwrap();
        let loaded = methods::load(&files, base).unwrap();
        assert_eq!(loaded.task_head(), Some(head));
        let unscored = methods::load(&plain.export().unwrap(), base).unwrap();
        assert_eq!(with(base, loaded.clone()), with(base, unscored));
        let x = Tensor::ones((2, base.info.hidden), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert_eq!(base.logits(&x, Some(loaded.as_ref())).unwrap().dims(), [2, head.width()]);
        let resumed = methods::resume(&files, base).unwrap().export().unwrap();
        assert_eq!(with(base, methods::load(&resumed, base).unwrap()), with(base, loaded));
        assert_eq!(methods::score::head(&resumed).unwrap().as_ref(), Some(head));
    });
}

/// Stopped in the middle of an epoch, in each phase of a method that has phases: what follows is the same to the bit.
#[test]
fn a_stopped_run_goes_on_as_if_it_had_not_been() {
    each(|row, _, base| {
        let rows = rows(&[9, 6, 12, 5, 7, 8, 4], 6);
        let training = json!({"n_epochs": 2, "batch_size": 2, "learning_rate": row.rate, "weight_decay": 0.1,
                              "checkpoint_every": 7});
        let spec = spec(base, row.adapter.clone(), training);
        let (adapter, whole) = finish(base, &spec, &rows, From::default());
        for stop in [1, 3, 6, 7] {
            let mut recorder = Recorder { control: Some((stop, Control::Drain)), ..Recorder::default() };
            assert!(matches!(run(base, &spec, &rows, From::default(), &mut recorder).unwrap(), Outcome::Drained));
            let snapshot = recorder.snapshots.last().unwrap();
            assert_eq!(snapshot.step, stop);
            let (resumed, rest) = finish(base, &spec, &rows, From { resume: Some(snapshot), ..From::default() });
            let bits = |losses: &[f64]| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&rest.losses()), bits(&whole.losses()[stop as usize..]), "{} from {stop}", row.adapter);
            assert!(resumed == adapter, "{} from {stop}: another adapter", row.adapter);
            let last = |recorder: &Recorder| recorder.snapshots.last().unwrap().files[3].clone();
            assert!(last(&rest) == last(&whole), "{} from {stop}: another state", row.adapter);
        }
    });
}

/// A run that keeps only the layers' inputs ends with the same bytes. Where parts of a gradient meet outside of a layer
/// (a penalty's, that of weights which the layers or both ends share), they are added in another order, and from the
/// second step on Adam and routers' choices make much of a last bit: there the first step has to be the same, from
/// random values.
#[test]
fn layers_run_again_give_the_same_gradients() {
    each(|row, method, base| {
        let is_summed = ["adalora", "moe_lora", "xlora", "full"].contains(&method.type_name());
        let start = is_summed.then(|| shaken(method, base, 6).export().unwrap());
        let run = |checkpointing: bool| {
            let training = json!({"n_epochs": 3, "batch_size": 2, "grad_accumulation": 2, "learning_rate": 1e-2,
                                  "gradient_checkpointing": checkpointing, "validation_split": 0.2});
            let spec = spec(base, row.adapter.clone(), training);
            finish(base, &spec, &rows(&[9, 6, 12, 5, 8, 7], 6), From { start: start.as_ref(), ..From::default() })
        };
        let ((whole, kept), (again, recorder)) = (run(false), run(true));
        let figures = |recorder: &Recorder| recorder.metrics.iter().map(|m| m.figures.clone()).collect::<Vec<_>>();
        if is_summed {
            assert_eq!(recorder.losses()[0], kept.losses()[0], "{}", row.adapter);
            assert_eq!(figures(&recorder)[0], figures(&kept)[0], "{}", row.adapter);
            let (a, b) = (recorder.norms()[0], kept.norms()[0]);
            assert!((a - b).abs() < 1e-5 * b, "{} on {}: {a} {b}", row.adapter, base.info.id);
            return;
        }
        assert!(whole == again, "{}", row.adapter);
        assert_eq!((recorder.losses(), recorder.norms()), (kept.losses(), kept.norms()));
        assert_eq!(figures(&recorder), figures(&kept));
    });
}

#[test]
fn rows_of_two_adapters_and_the_base_do_not_mix() {
    each(|_, spec, base| {
        let load = |seed| methods::load(&shaken(spec, base, seed).export().unwrap(), base).unwrap();
        let (a, b) = (load(10), load(11));
        let sequences: [Carried; 4] = [
            (&TOKENS[..5], Some(a.clone())),
            (&TOKENS[1..], None),
            (&TOKENS[2..4], Some(b.clone())),
            (&TOKENS, Some(a.clone())),
        ];
        let together = hidden(base, &sequences);
        let apart: Vec<Vec<f32>> = sequences.iter().flat_map(|one| hidden(base, std::slice::from_ref(one))).collect();
        assert!(together == apart, "a row depends on its neighbours");
    });
}

/// Serving: pieces of a prompt through a cache, alone and beside others, come to what one whole pass gives.
#[test]
fn caches_and_neighbours_change_nothing() {
    each(|_, spec, base| {
        let load = |seed| methods::load(&shaken(spec, base, seed).export().unwrap(), base).unwrap();
        let (hook, other) = (load(13), load(14));
        let pieces = |beside: bool| {
            let (mut cache, mut others, mut bare) = (base.new_cache(), base.new_cache(), base.new_cache());
            let mut rows = Vec::new();
            for piece in [&TOKENS[..4], &TOKENS[4..5], &TOKENS[5..]] {
                let mut sequences = vec![sequence(piece, Some(&hook), Some(&mut cache))];
                if beside {
                    sequences.push(sequence(&TOKENS[..3], Some(&other), Some(&mut others)));
                    sequences.push(sequence(&TOKENS[..3], None, Some(&mut bare)));
                }
                let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
                rows.extend(hidden.narrow(0, 0, piece.len()).unwrap().to_vec2::<f32>().unwrap());
            }
            rows
        };
        let alone = pieces(false);
        assert!(alone == pieces(true), "a row depends on its neighbours");
        for (found, expected) in alone.concat().iter().zip(with(base, hook.clone()).concat()) {
            assert!((found - expected).abs() < 5e-5, "{found} {expected}");
        }
    });
}

#[test]
fn files_that_do_not_fit_are_refused_by_name() {
    let base = &bases()[0];
    let spec = MethodSpec::from_json(&json!({"r": 3, "alpha": 7})).unwrap();
    let files = shaken(&spec, base, 12).export().unwrap();
    let refusal = |files: &AdapterFiles| match methods::load(files, base) {
        Err(error @ (MethodError::Mismatch(_) | MethodError::Unsupported(_))) => error.to_string(),
        Err(error) => panic!("{error:?}"),
        Ok(_) => panic!("the files were taken"),
    };
    let config = |key: &str, value: Value| {
        let mut config: Value = serde_json::from_slice(&files.config).unwrap();
        config[key] = value;
        AdapterFiles { config: config.to_string().into_bytes(), ..files.clone() }
    };
    for (key, value) in [
        ("lora_bias", json!(true)),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("fan_in_fan_out", json!(true)),
        ("layer_replication", json!([[0, 1]])),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("task_type", json!("QUESTION_ANS")),
        ("peft_type", json!("VERA")),
        ("r", json!("3")),
        ("target_modules", json!(7)),
    ] {
        let text = refusal(&config(key, value));
        assert!(text.contains(key), "{key}: {text}");
    }
    assert!(refusal(&config("target_modules", json!(["nothing"]))).contains("match no module"));
    assert!(refusal(&config("r", json!(5))).contains("lora_A.weight has shape [3, 64], not [5, 64]"));
    assert!(refusal(&config("target_modules", json!(["q_proj"]))).contains("match no module of the base"));
    // Unknown, harmless or null: taken.
    for (key, value) in
        [("base_model_name_or_path", Value::Null), ("some_new_key", json!(3)), ("corda_config", Value::Null)]
    {
        methods::load(&config(key, value), base).unwrap();
    }

    let tensors = safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap();
    let victim = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
    let weights = |change: &dyn Fn(&mut std::collections::HashMap<String, Tensor>)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        let dir = tempfile::tempdir().unwrap();
        safetensors::save(&tensors, dir.path().join("a")).unwrap();
        AdapterFiles { weights: std::fs::read(dir.path().join("a")).unwrap(), ..files.clone() }
    };
    let missing = weights(&|tensors| drop(tensors.remove(victim)));
    assert_eq!(refusal(&missing), format!("tensor {victim} is missing"));
    let extra = weights(&|tensors| drop(tensors.insert("lm_head.weight".into(), tensors[victim].clone())));
    assert!(refusal(&extra).contains("lm_head.weight"));
    let turned =
        weights(&|tensors| drop(tensors.insert(victim.into(), tensors[victim].t().unwrap().contiguous().unwrap())));
    assert!(refusal(&turned).contains(victim) && refusal(&turned).contains("shape"));
    let nan = weights(&|tensors| drop(tensors.insert(victim.into(), (&tensors[victim] * f64::NAN).unwrap())));
    assert!(refusal(&nan).contains(victim) && refusal(&nan).contains("NaN"));
    // Half precision is read, zero B is taken.
    let half = weights(&|tensors| {
        tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(candle_core::DType::BF16).unwrap());
        drop(tensors.insert(victim.into(), tensors[victim].zeros_like().unwrap()));
    });
    methods::load(&half, base).unwrap();
}
