//! PEFT reads what we write, and we read what PEFT writes: `tests/fixtures/peft/check.py` says how the files beside it
//! were made, and checks the first half itself.

mod real;

use std::{collections::BTreeSet, fs, path::PathBuf, sync::Arc};

use attune::{
    domain::MethodSpec,
    methods::{self, AdapterFiles, MethodError, Named, Trainable, file::tensor_bytes},
    model::{Base, Batch, Hook, Sequence},
};
use candle_core::{Device, Tensor, safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    tiny::{Random, Tiny},
    training::{self, create},
};

const TOKENS: [u32; 7] = [7, 250, 33, 101, 5, 64, 199];
const FAMILIES: [&str; 2] = ["llama", "qwen2"];

/// Our adapters, by family and name. Every method that PEFT has has one.
fn ours() -> Vec<(&'static str, &'static str, Value)> {
    vec![
        ("llama", "lora", json!({"type": "lora", "r": 3, "alpha": 7})),
        (
            "qwen2",
            "lora_patterns",
            json!({"type": "lora", "r": 4, "alpha": 6, "use_rslora": true, "layers_to_transform": [1],
                   "target_modules": ["q_proj", "v_proj", "down_proj"], "exclude_modules": ["o_proj"],
                   "rank_pattern": {"1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 11}}),
        ),
        (
            "qwen2",
            "dora",
            json!({"type": "dora", "r": 3, "alpha": 7, "target_modules": ["q_proj", "o_proj", "up_proj"]}),
        ),
        ("llama", "adalora", json!({"type": "adalora", "init_r": 3, "target_r": 2, "alpha": 7})),
        ("qwen2", PRUNED, json!({"type": "adalora", "init_r": 4, "target_r": 1, "alpha": 7})),
        ("llama", "prompt_tuning", json!({"type": "prompt_tuning", "num_virtual_tokens": 5})),
        ("llama", "p_tuning_mlp", json!({"type": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 24})),
        (
            "qwen2",
            "p_tuning_lstm",
            json!({"type": "p_tuning", "num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM",
                   "encoder_hidden_size": 20, "encoder_dropout": 0.1}),
        ),
        ("llama", "p_tuning_v2", json!({"type": "p_tuning_v2", "num_virtual_tokens": 6})),
        (
            "qwen2",
            "prefix_projection",
            json!({"type": "prefix_tuning", "num_virtual_tokens": 5, "prefix_projection": true}),
        ),
        ("llama", "prefix_tuning", json!({"type": "prefix_tuning", "num_virtual_tokens": 5})),
        ("llama", "ia3", json!({"type": "ia3"})),
        ("qwen2", "ia3", json!({"type": "ia3"})),
        (
            "qwen2",
            "ia3_everywhere",
            json!({"type": "ia3", "target_modules": "all-linear",
                                          "feedforward_modules": r".*\.(o|up|down)_proj"}),
        ),
    ]
}

const PRUNED: &str = "adalora_pruned";

/// Methods without a format of PEFT's own; a QLoRA is a LORA. `xlora.rs` has X-LoRA's directories.
const NOT_PEFTS: [&str; 5] = ["moe_lora", "unipelt", "qlora", "xlora", "full"];

/// Made by PEFT, by family and name.
const THEIRS: [(&str, &str); 15] = [
    ("llama", "lora_rslora_patterns"),
    ("qwen2", "lora_one_layer"),
    ("llama", "lora_expression"),
    ("llama", "lora_bf16"),
    ("qwen2", "dora"),
    ("llama", "adalora"),
    ("qwen2", "adalora_pruned"),
    ("llama", "ia3"),
    ("qwen2", "ia3"),
    ("qwen2", "ia3_expression"),
    ("llama", "prompt_tuning"),
    ("llama", "p_tuning_mlp"),
    ("qwen2", "p_tuning_lstm"),
    ("llama", "prefix_tuning"),
    ("qwen2", "prefix_projection"),
];

fn fixture(side: &str, family: &str, name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft").join(side).join(family).join(name)
}

fn files(folder: PathBuf) -> AdapterFiles {
    let file = |name| fs::read(folder.join(name)).unwrap();
    AdapterFiles { config: file("adapter_config.json"), weights: file("adapter_model.safetensors") }
}

fn tiny(family: &'static str) -> Tiny {
    Tiny { model_type: family, ..Tiny::default() }
}

fn base(family: &'static str) -> Arc<Base> {
    let dir = TempDir::new().unwrap();
    tiny(family).write(dir.path());
    Base::open("tiny", dir.path()).unwrap()
}

fn scores(base: &Base, hook: Arc<dyn Hook>) -> Tensor {
    let sequences = vec![Sequence { tokens: &TOKENS, branches: &[], hook: Some(hook.clone()), cache: None }];
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    base.logits(&hidden, Some(hook.as_ref())).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// One of our adapters, with random numbers in every tensor: `fill` makes them of the first ones and of normal ones.
fn filled(base: &Base, name: &str, adapter: &Value, fill: fn(f32, f32) -> f32) -> Box<dyn Trainable> {
    let spec = training::method(base, adapter);
    spec.check(&base.info).unwrap();
    let mut method = create(&spec, base, 1);
    let mut random = Random(2);
    for (_, variable) in method.variables() {
        let values = numbers(&variable).into_iter().map(|first| fill(first, random.normal())).collect();
        variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    if name == PRUNED {
        method.restore(settled(base, &spec)).unwrap();
    }
    method
}

/// The files of one of our adapters.
fn export(base: &Base, name: &str, adapter: &Value) -> AdapterFiles {
    filled(base, name, adapter, |_, normal| 0.2 * normal).export().unwrap()
}

/// AdaLoRA's state after its last pruning: the first module keeps nothing, the others some.
fn settled(base: &Base, spec: &MethodSpec) -> Vec<Named> {
    let MethodSpec::AdaLora(spec) = spec else { panic!("{spec:?}") };
    let modules = spec.targets(&base.info).unwrap().into_iter().enumerate();
    let named = modules.map(|(i, (layer, site))| {
        let flags = (0..spec.init_r).map(|j| if i > 0 && (i + j) % 3 > 0 { 1.0 } else { 0.0 });
        (format!("kept.{}.lora_E", site.path(layer)), vec![spec.init_r], flags.collect())
    });
    named.collect()
}

#[test]
fn pefts_scores_are_ours() {
    for family in FAMILIES {
        let base = base(family);
        let check = |side: &str, name: &str| {
            let folder = fixture(side, family, name);
            let expected = safetensors::load(folder.join("scores.safetensors"), &Device::Cpu).unwrap();
            let expected = numbers(&expected["scores"]);
            let hook = methods::load(&files(folder), &base).unwrap_or_else(|error| panic!("{family} {name}: {error}"));
            let found = numbers(&scores(&base, hook));
            let largest = expected.iter().fold(1f32, |most, x| most.max(x.abs()));
            assert_eq!(found.len(), expected.len());
            let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-5 * largest, "{side} {family} {name}: {apart}");
        };
        ours().iter().filter(|(of, ..)| *of == family).for_each(|(_, name, _)| check("ours", name));
        THEIRS.iter().filter(|(of, _)| *of == family).for_each(|(_, name)| check("theirs", name));
    }
}

/// What PEFT was shown is what we write today; encoders' products differ in their last bits between machines.
#[test]
fn we_still_write_what_peft_was_shown() {
    for family in FAMILIES {
        let base = base(family);
        for (_, name, adapter) in ours().into_iter().filter(|(of, ..)| *of == family) {
            let (now, then) = (export(&base, name, &adapter), files(fixture("ours", family, name)));
            assert_eq!(String::from_utf8(now.config), String::from_utf8(then.config), "{name}");
            let tensors = |bytes: &[u8]| safetensors::load_buffer(bytes, &Device::Cpu).unwrap();
            let (now, then) = (tensors(&now.weights), tensors(&then.weights));
            assert_eq!(now.keys().collect::<BTreeSet<_>>(), then.keys().collect::<BTreeSet<_>>(), "{name}");
            for (key, now) in now {
                assert_eq!(now.dims(), then[&key].dims(), "{name}: {key}");
                let pairs = numbers(&now).into_iter().zip(numbers(&then[&key]));
                assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-5), "{name}: {key}");
            }
        }
    }
}

#[test]
fn every_method_has_been_shown() {
    let shown: BTreeSet<String> = ours().iter().map(|(_, _, adapter)| adapter["type"].to_string()).collect();
    for spec in MethodSpec::all().iter().filter(|spec| !NOT_PEFTS.contains(&spec.type_name())) {
        assert!(shown.contains(&json!(spec.type_name()).to_string()), "{} has no adapter here", spec.type_name());
    }
}

/// What PEFT can do and we cannot is refused by the name of the key, never left out.
#[test]
fn what_we_lack_is_refused_by_name() {
    let base = base("llama");
    let refusal = |name: &str, key: &str, value: &Value| {
        let mut files = files(fixture("theirs", "llama", name));
        let mut config: Value = serde_json::from_slice(&files.config).unwrap();
        config[key] = value.clone();
        files.config = config.to_string().into_bytes();
        match methods::load(&files, &base) {
            Err(MethodError::Unsupported(text)) => text,
            Err(other) => panic!("{name} with {key} {value}: {other}"),
            Ok(_) => panic!("{name} with {key} {value} was taken"),
        }
    };
    let low_rank = [
        ("bias", json!("lora_only")),
        ("fan_in_fan_out", json!(true)),
        ("layer_replication", json!([[0, 2], [1, 2]])),
        ("lora_bias", json!(true)),
        ("target_parameters", json!(["mlp.experts.down_proj"])),
        ("alora_invocation_tokens", json!([3])),
        ("arrow_config", json!({"top_k": 1})),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"nblocks": 2})),
        ("layers_pattern", json!("blocks")),
        ("task_type", json!("QUESTION_ANS")),
    ];
    for (key, value) in &low_rank {
        for name in ["lora_expression", "adalora"] {
            let text = refusal(name, key, value);
            assert!(text.contains(key), "{name} {key}: {text}");
        }
    }
    for (key, value) in
        [("fan_in_fan_out", json!(true)), ("modules_to_save", json!(["norm"])), ("task_type", json!("QUESTION_ANS"))]
    {
        let text = refusal("ia3", key, &value);
        assert!(text.contains(key), "ia3 {key}: {text}");
    }
    for kind in ["VERA", "LOHA", "LOKR", "OFT", "BOFT", "LN_TUNING", "ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING"] {
        let text = refusal("ia3", "peft_type", &json!(kind));
        assert!(text.contains("peft_type") && text.contains(kind), "{text}");
    }
}

/// Writes `target/peft` for `check.py`.
#[test]
#[ignore = "makes what check.py shows to PEFT"]
fn adapters_for_peft() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/peft");
    _ = fs::remove_dir_all(&root);
    for family in FAMILIES {
        tiny(family).write(&root.join("bases").join(family));
    }
    fs::write(root.join("tokens.json"), json!(TOKENS).to_string()).unwrap();
    for (family, name, adapter) in ours() {
        let base = base(family);
        let files = export(&base, name, &adapter);
        let folder = root.join("ours").join(family).join(name);
        fs::create_dir_all(&folder).unwrap();
        let scores = scores(&base, methods::load(&files, &base).unwrap());
        let named = ("scores".to_owned(), scores.dims().to_vec(), numbers(&scores));
        fs::write(folder.join("scores.safetensors"), tensor_bytes(&[named])).unwrap();
        fs::write(folder.join("adapter_config.json"), files.config).unwrap();
        fs::write(folder.join("adapter_model.safetensors"), files.weights).unwrap();
    }
}
