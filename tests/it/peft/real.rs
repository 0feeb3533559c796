//! The same on a real model, SmolLM2. Its adapters are too large to be kept: `tests/fixtures/peft/real.json` has what
//! makes them again (a request, or PEFT's config with the seed of all numbers), and some of PEFT's scores.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc};

use attune::{
    domain::TaskHead,
    methods::{self, AdapterFiles, Named, file::tensor_bytes, score},
    model::{Base, Batch, Hook, Sequence},
    text::Text,
};
use candle_core::Tensor;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{PRUNED, filled, numbers};
use crate::support::{package, tiny::Random};

const TEXTS: [&str; 3] = [
    "Once upon a time",
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\n\nassert add(2, 3) ==",
];
/// Between our scores and PEFT's, which are between -20 and 30.
const LIMIT: f32 = 1e-3;
const FOLDED: &str = "adalora_folded";
const HEAD: &str = "head";

/// Our adapters by name: one for each of PEFT's types, and what one can have.
fn ours() -> Vec<(&'static str, Value)> {
    let pruned = json!({"type": "adalora", "init_r": 4, "target_r": 1, "alpha": 7});
    vec![
        ("lora", json!({"type": "lora", "r": 3, "alpha": 7})),
        (
            "rslora",
            json!({"type": "lora", "r": 5, "alpha": 3, "use_rslora": true, "exclude_modules": ["o_proj"],
                   "rank_pattern": {"1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 4}}),
        ),
        (
            "pissa",
            json!({"type": "lora", "r": 4, "alpha": 6, "init_lora_weights": "pissa_niter_2",
                   "target_modules": ["q_proj"], "layers_to_transform": [0, 17]}),
        ),
        (
            "saved",
            json!({"type": "lora", "r": 2, "alpha": 3, "target_modules": ["v_proj"], "modules_to_save": ["model.norm"],
                   "trainable_token_indices": [253, 28]}),
        ),
        ("dora", json!({"type": "dora", "r": 3, "alpha": 7, "target_modules": ["q_proj", "o_proj", "up_proj"]})),
        ("adalora", json!({"type": "adalora", "init_r": 3, "target_r": 2, "alpha": 7})),
        (PRUNED, pruned.clone()),
        (FOLDED, pruned),
        ("ia3", json!({"type": "ia3"})),
        ("prompt_tuning", json!({"type": "prompt_tuning", "num_virtual_tokens": 9})),
        ("p_tuning_mlp", json!({"type": "p_tuning", "num_virtual_tokens": 6, "encoder_hidden_size": 40})),
        (
            "p_tuning_lstm",
            json!({"type": "p_tuning", "num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM",
                   "encoder_hidden_size": 20, "encoder_dropout": 0.1}),
        ),
        ("prefix_tuning", json!({"type": "prefix_tuning", "num_virtual_tokens": 7})),
        ("prefix_projection", json!({"type": "prefix_tuning", "num_virtual_tokens": 5, "prefix_projection": true})),
        (
            "xlora",
            json!({"type": "xlora", "adapters": ["a", "b"], "global_scaling_weight": 0.1, "softmax_temperature": 0.7}),
        ),
        (HEAD, json!({"type": "lora", "r": 3, "alpha": 7, "target_modules": ["q_proj", "v_proj"]})),
    ]
}

#[derive(Deserialize)]
struct Kept {
    texts: Vec<Vec<u32>>,
    /// Which of the vocabulary's scores are kept, of each text's last token.
    columns: Vec<u32>,
    /// By name: the request, and PEFT's scores.
    ours: BTreeMap<String, (Value, Vec<Vec<f32>>)>,
    theirs: BTreeMap<String, Theirs>,
}

/// An adapter that PEFT wrote.
#[derive(Deserialize)]
struct Theirs {
    config: Value,
    seed: u64,
    /// In the order in which one stream of normal numbers fills them: name, shape, mean, deviation.
    tensors: Vec<(String, Vec<usize>, f32, f32)>,
    scores: Vec<Vec<f32>>,
}

impl Theirs {
    fn files(&self) -> AdapterFiles {
        let mut random = Random(self.seed);
        let tensors = self.tensors.iter().map(|(name, shape, mean, deviation)| {
            let n: usize = shape.iter().product();
            let values = (0..n).map(|_| mean + deviation * random.normal());
            (name.clone(), shape.clone(), values.collect())
        });
        let tensors: Vec<Named> = tensors.collect();
        AdapterFiles { config: self.config.to_string().into_bytes(), weights: tensor_bytes(&tensors) }
    }
}

fn base() -> Arc<Base> {
    Base::open("smollm2", &package::smollm2()).unwrap()
}

fn export(base: &Base, name: &str, adapter: &Value) -> AdapterFiles {
    let mut method =
        filled(base, name.replace(FOLDED, PRUNED).as_str(), adapter, |first, normal| first + 0.05 * normal);
    if name == HEAD {
        let labels = ["bad", "good", "so so"].map(str::to_owned).to_vec();
        method = score::fresh(method, TaskHead::Sequence { labels }, base, 3).unwrap();
    }
    let files = method.export().unwrap();
    if name == FOLDED { methods::as_lora(&files, &base.info).unwrap() } else { files }
}

/// Normed hidden rows of all texts, one behind another, in one batch.
fn hidden(base: &Base, texts: &[Vec<u32>], hook: &Arc<dyn Hook>) -> Tensor {
    let sequences =
        texts.iter().map(|tokens| Sequence { tokens, branches: &[], hook: Some(hook.clone()), cache: None }).collect();
    base.forward(&mut Batch { sequences, train: None }).unwrap()
}

/// Behind each text's last token.
fn last_scores(base: &Base, texts: &[Vec<u32>], files: &AdapterFiles) -> Vec<Vec<f32>> {
    let hook = methods::load(files, base).unwrap();
    let hidden = hidden(base, texts, &hook);
    let ends = texts.iter().scan(0, |end, text| {
        *end += text.len() as u32;
        Some(*end - 1)
    });
    let ends = Tensor::from_iter(ends, hidden.device()).unwrap();
    base.logits(&hidden.index_select(&ends, 0).unwrap(), Some(hook.as_ref())).unwrap().to_vec2().unwrap()
}

#[test]
fn scores_are_pefts() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft/real.json");
    let kept: Kept = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let base = base();
    let check = |name: &str, files: &AdapterFiles, expected: &[Vec<f32>]| {
        let found = last_scores(&base, &kept.texts, files);
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.iter().zip(expected) {
            // A head's are kept whole.
            let is_head = found.len() < kept.columns.len();
            let some: Vec<f32> = kept.columns.iter().map_while(|id| found.get(*id as usize)).copied().collect();
            let found = if is_head { found } else { &some };
            assert_eq!(found.len(), expected.len(), "{name}");
            let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < LIMIT, "{name}: {apart}");
        }
    };
    let now: BTreeMap<_, _> = ours().into_iter().collect();
    assert_eq!(now.len(), kept.ours.len(), "an adapter that PEFT was not shown");
    for (name, (adapter, expected)) in &kept.ours {
        assert_eq!(now[name.as_str()], *adapter, "{name} is not what PEFT was shown");
        check(name, &export(&base, name, adapter), expected);
    }
    for (name, theirs) in &kept.theirs {
        check(name, &theirs.files(), &theirs.scores);
    }
}

/// Writes `target/peft-real` for `check.py`.
#[test]
#[ignore = "makes what check.py shows to PEFT"]
fn adapters_for_peft() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/peft-real");
    _ = fs::remove_dir_all(&root);
    fs::create_dir_all(&root).unwrap();
    let model = package::smollm2();
    let (base, tokenizer) = (base(), Text::open(&model).unwrap().tokenizer);
    let texts: Vec<Vec<u32>> = TEXTS.iter().map(|text| tokenizer.encode(text, false).unwrap()).collect();
    fs::write(root.join("about.json"), json!({"texts": texts, "model": model}).to_string()).unwrap();
    for (name, adapter) in ours() {
        let files = export(&base, name, &adapter);
        let hook = methods::load(&files, &base).unwrap();
        let scores = match name {
            HEAD => {
                let last = last_scores(&base, &texts, &files);
                let width = last[0].len();
                ("scores".to_owned(), vec![last.len(), width], last.concat())
            }
            _ => {
                let scores = base.logits(&hidden(&base, &texts, &hook), Some(hook.as_ref())).unwrap();
                ("scores".to_owned(), scores.dims().to_vec(), numbers(&scores))
            }
        };
        let folder = root.join(name);
        for (path, bytes) in methods::directory(files).unwrap() {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        fs::write(folder.join("request.json"), adapter.to_string()).unwrap();
        fs::write(folder.join("scores.safetensors"), tensor_bytes(&[scores])).unwrap();
    }
}
