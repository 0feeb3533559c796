//! AdapterHub reads our UniPELT: `tests/fixtures/adapterhub/check.py` showed it what we write, and says how.

use std::{fs, path::PathBuf, sync::Arc};

use attune::{
    domain::{BaseInfo, MethodSpec, TaskHead, WordToken},
    methods::{self, AdapterFiles, file::tensor_bytes, score},
    model::{Base, Batch, Hook, Sequence},
};
use candle_core::{Device, Tensor, safetensors};
use serde_json::{Value, json};

use crate::{
    golden::{base, largest_difference},
    support::{tiny::Random, training::create},
};

/// Uneven, and none with the golden base's pad token.
const TEXTS: [&[u32]; 3] = [&[7, 90, 33, 5, 64, 11, 2], &[3, 4], &[21, 60, 8, 8, 95]];

fn heads() -> Vec<(&'static str, TaskHead)> {
    let labels = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    vec![
        ("sequence", TaskHead::Sequence { labels: labels(&["bad", "good", "so so"]) }),
        ("score", TaskHead::Score),
        ("token", TaskHead::Token { labels: labels(&["O", "B-PER", "I-PER"]), word_token: WordToken::Last }),
    ]
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapterhub").join(name)
}

fn request(mode: &str) -> Value {
    json!({"type": "unipelt", "lora_r": 3, "prefix_length": 4, "bottleneck_size": 10, "reduction_factor": 9, "gate_mode": mode})
}

/// Our own files, with random numbers everywhere; without a head where none is given.
fn files(base: &Base, mode: &str, head: Option<&TaskHead>) -> AdapterFiles {
    let mut method = create(&MethodSpec::from_json(&request(mode)).unwrap(), base, 1);
    if let Some(head) = head {
        method = score::fresh(method, head.clone(), base, 1).unwrap();
    }
    let mut random = Random(3);
    for (_, variable) in method.variables() {
        let values: Vec<f32> = (0..variable.elem_count()).map(|_| 0.3 * random.normal()).collect();
        variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    method.export().unwrap()
}

/// What the head says at every token, of all texts in one batch.
fn scores(base: &Base, hook: &Arc<dyn Hook>, texts: &[&[u32]]) -> Tensor {
    let sequences =
        texts.iter().map(|tokens| Sequence { tokens, branches: &[], hook: Some(hook.clone()), cache: None }).collect();
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    base.logits(&hidden, Some(hook.as_ref())).unwrap()
}

/// At the tokens where AdapterHub's heads speak: every one, or each text's last.
fn said(base: &Base, hook: &Arc<dyn Hook>, head: &TaskHead) -> Tensor {
    let all = scores(base, hook, &TEXTS);
    if matches!(head, TaskHead::Token { .. }) {
        return all;
    }
    let ends = TEXTS.iter().scan(0, |end, text| {
        *end += text.len() as u32;
        Some(*end - 1)
    });
    all.index_select(&Tensor::from_iter(ends, &Device::Cpu).unwrap(), 0).unwrap()
}

#[test]
fn adapterhubs_scores_are_ours() {
    let base = base();
    for (name, head) in heads() {
        let files = files(&base, "sequence_mean", Some(&head));
        for (path, bytes) in methods::as_adapterhub(&files, &base.info).unwrap() {
            assert!(bytes == fs::read(folder(name).join(&path)).unwrap(), "{name}: {path} is not what it was shown");
        }
        let expected = safetensors::load(folder(name).join("scores.safetensors"), &Device::Cpu).unwrap();
        let found = said(&base, &methods::load(&files, &base).unwrap(), &head);
        let apart = largest_difference(&found, &expected["scores"]);
        assert!(apart < 1e-5, "{name}: {apart}");
    }
}

/// Each sequence has a mean of its own, whatever stands beside it, and every token sees the whole text.
#[test]
fn means_are_each_sequences_own() {
    let base = base();
    let (_, head) = &heads()[2];
    let hook = methods::load(&files(&base, "sequence_mean", Some(head)), &base).unwrap();
    assert!(hook.sees_ahead());
    let together = scores(&base, &hook, &TEXTS);
    let mut start = 0;
    for text in TEXTS {
        let alone = scores(&base, &hook, &[text]);
        assert!(largest_difference(&together.narrow(0, start, text.len()).unwrap(), &alone) < 1e-6);
        start += text.len();
    }
    let mut other = TEXTS[0].to_vec();
    other[6] = 50;
    let other = scores(&base, &hook, &[&other]);
    assert!(largest_difference(&other.narrow(0, 0, 6).unwrap(), &together.narrow(0, 0, 6).unwrap()) > 1e-3);
}

#[test]
fn what_adapterhub_cannot_have_is_refused_with_the_reason() {
    let base = base();
    let (_, head) = &heads()[0];
    let refusal = |files: &AdapterFiles, info: &BaseInfo| methods::as_adapterhub(files, info).unwrap_err().to_string();
    let info = |change: fn(&mut BaseInfo)| {
        let mut info = base.info.clone();
        change(&mut info);
        info
    };
    let means = files(&base, "sequence_mean", Some(head));
    let causal = files(&base, "token", None);
    let lora = create(&MethodSpec::from_json(&json!({"type": "lora"})).unwrap(), &base, 1).export().unwrap();
    for (files, info, text) in [
        (&causal, base.info.clone(), "gate_mode token"),
        (&files(&base, "token", Some(head)), base.info.clone(), "gate_mode token"),
        (&files(&base, "sequence_mean", None), base.info.clone(), "need a head"),
        (&means, info(|info| info.architecture = "qwen2".to_owned()), "is qwen2"),
        (&means, info(|info| info.head_dim = 16), "which is 16"),
        (&lora, base.info.clone(), "this is lora"),
    ] {
        let refusal = refusal(files, &info);
        assert!(refusal.contains(text), "{refusal}");
    }
    // An adapter that sees ahead writes no text: neither here.
    let headless = files(&base, "sequence_mean", None);
    for error in [methods::load(&headless, &base).err(), methods::resume(&headless, &base).err()] {
        let error = error.unwrap().to_string();
        assert!(error.contains("gate_mode") && error.contains("SEQ_CLS"), "{error}");
    }
    assert!(methods::load(&causal, &base).is_ok());
}

/// Writes `target/adapterhub` for `check.py`.
#[test]
#[ignore = "makes what check.py shows to AdapterHub"]
fn adapters_for_adapterhub() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/adapterhub");
    _ = fs::remove_dir_all(&root);
    let base = base();
    for (name, head) in heads() {
        let (files, folder) = (files(&base, "sequence_mean", Some(&head)), root.join(name));
        fs::create_dir_all(&folder).unwrap();
        for (path, bytes) in methods::as_adapterhub(&files, &base.info).unwrap() {
            fs::write(folder.join(path), bytes).unwrap();
        }
        let found = said(&base, &methods::load(&files, &base).unwrap(), &head);
        let values = found.flatten_all().unwrap().to_vec1().unwrap();
        let scores = ("scores".to_owned(), found.dims().to_vec(), values);
        fs::write(folder.join("scores.safetensors"), tensor_bytes(&[scores])).unwrap();
    }
    fs::write(root.join("texts.json"), json!(TEXTS).to_string()).unwrap();
}
