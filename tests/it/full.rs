//! Full fine-tuning: its file is a model's own, and nothing of the base is left in what it says.

use std::{collections::HashMap, fs, path::Path};

use attune::{
    domain::MethodSpec,
    methods::{self, AdapterFiles, merged},
    model::Base,
};
use candle_core::{Device, Tensor, quantized::GgmlDType, safetensors};
use serde_json::json;

use crate::{
    merge::{far, scores},
    support::{
        quantised,
        tiny::Tiny,
        training::{From, finish, rows, spec},
    },
};

fn tensors(bytes: &[u8]) -> HashMap<String, Tensor> {
    safetensors::load_buffer(bytes, &Device::Cpu).unwrap()
}

/// Tied; with biases and an output layer of its own; with norms of heads.
#[test]
fn every_tensor_of_the_model_is_trained() {
    let untied = Tiny { tied: false, ..Tiny::default() };
    for tiny in
        [Tiny::default(), Tiny { model_type: "qwen2", ..untied.clone() }, Tiny { model_type: "qwen3", ..untied }]
    {
        let dir = tempfile::tempdir().unwrap();
        let (first, second, third) = (dir.path().join("1"), dir.path().join("2"), dir.path().join("3"));
        [&first, &second].iter().for_each(|place| tiny.write(place));
        let base = Base::open("tiny", &first).unwrap();
        let training = json!({"n_epochs": 8, "batch_size": 2, "learning_rate": 2e-3, "weight_decay": 0.0});
        let spec = spec(&base, json!({"type": "full"}), training);
        let (files, recorder) = finish(&base, &spec, &rows(&[9, 6, 12], 6), From::default());
        assert!(recorder.losses()[15] < 0.7 * recorder.losses()[0], "{:?}", recorder.losses());

        let (model, own) = (tensors(&fs::read(first.join("model.safetensors")).unwrap()), tensors(&files.weights));
        assert_eq!(own.len(), model.len());
        for (name, before) in &model {
            assert!(far(&own[name], before) > 1e-4, "{name} has not moved");
        }
        let count: usize = own.values().map(Tensor::elem_count).sum();
        assert_eq!(count as u64, spec.adapter.trainable(&base.info));

        // In the place of the model's file it is the tuned model; so is the directory of the merged one.
        let served = scores(&base, Some(methods::load(&files, &base).unwrap()));
        fs::write(second.join("model.safetensors"), &files.weights).unwrap();
        fs::create_dir(&third).unwrap();
        for (name, bytes) in merged::directory(&files, &base).unwrap() {
            fs::write(third.join(name), bytes).unwrap();
        }
        for place in [&second, &third] {
            let tuned = Base::open("tuned", place).unwrap();
            assert!(far(&scores(&tuned, None), &served) < 1e-5);
            assert_eq!(tuned.info.tied, tiny.tied);
        }
        assert!(far(&scores(&base, None), &served) > 1e-2);
    }
}

#[test]
fn files_that_are_no_whole_model_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    let config = json!({"peft_type": "FULL", "task_type": "CAUSAL_LM"}).to_string().into_bytes();
    let model = tensors(&fs::read(dir.path().join("model.safetensors")).unwrap());
    let refusal = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let mut tensors = model.clone();
        change(&mut tensors);
        let path = dir.path().join("changed");
        safetensors::save(&tensors, &path).unwrap();
        let files = AdapterFiles { config: config.clone(), weights: fs::read(path).unwrap() };
        match methods::load(&files, &base) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("the files were taken"),
        }
    };
    let victim = "model.layers.1.mlp.up_proj.weight";
    assert_eq!(refusal(&|tensors| drop(tensors.remove(victim))), format!("tensor {victim} is missing"));
    let head = "lm_head.weight";
    let extra = refusal(&|tensors| drop(tensors.insert(head.into(), tensors[victim].clone())));
    assert!(extra.contains(head), "{extra}");
    let nan = refusal(&|tensors| drop(tensors.insert(victim.into(), (&tensors[victim] * f64::NAN).unwrap())));
    assert!(nan.contains(victim) && nan.contains("NaN"), "{nan}");
    // A base in few bits is another model.
    let path = dir.path().join("few.gguf");
    quantised::write(&Tiny::default(), &path, GgmlDType::Q4_1);
    let few = Base::open("few", &path).unwrap();
    let error = MethodSpec::from_json(&json!({"type": "full"})).unwrap().check(&few.info).unwrap_err();
    assert_eq!((error.param.as_str(), error.code), ("adapter.type", "spec_unsupported"));
}

fn base(dir: &Path) -> std::sync::Arc<Base> {
    Tiny::default().write(dir);
    Base::open("tiny", dir).unwrap()
}
