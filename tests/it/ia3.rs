//! (IA)³ against weights that were scaled themselves.

use std::{collections::HashMap, fs};

use attune::{
    domain::MethodSpec,
    methods,
    model::{Base, Batch, Sequence},
};
use candle_core::{Device, Tensor, safetensors};
use serde_json::{Value, json};

use crate::support::{
    tiny::{Random, Tiny},
    training::create,
};

/// `y = l ⊙ (x Wᵀ + b)` is `W` with scaled rows and `b` scaled as well; `y = (l ⊙ x) Wᵀ + b` is scaled columns. On a
/// family with biases and norms between the linear and RoPE, with inputs scaled at every kind of place.
#[test]
fn factors_are_scaled_weights() {
    let everywhere = json!({"type": "ia3", "target_modules": "all-linear",
                            "feedforward_modules": r".*(q_proj|o_proj|up_proj|down_proj)"});
    let outputs = json!({"type": "ia3", "target_modules": "all-linear", "feedforward_modules": []});
    for family in ["llama", "qwen2", "qwen3"] {
        for adapter in [json!({"type": "ia3"}), everywhere.clone(), outputs.clone()] {
            check(family, &adapter);
        }
    }
}

fn check(family: &'static str, adapter: &Value) {
    let dir = tempfile::tempdir().unwrap();
    Tiny { model_type: family, ..Tiny::default() }.write(dir.path());
    let base = Base::open("tiny", dir.path()).unwrap();
    let spec = MethodSpec::from_json(adapter).unwrap();
    spec.check(&base.info).unwrap();
    let method = create(&spec, &base, 1);
    let mut random = Random(3);
    let mut weights = safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    for (name, variable) in method.variables() {
        let values: Vec<f32> = (0..variable.elem_count()).map(|_| 1.0 + 0.5 * random.normal()).collect();
        let l = Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap();
        variable.set(&l).unwrap();
        let module = name.strip_prefix("base_model.model.").unwrap().strip_suffix(".ia3_l").unwrap();
        scale(&mut weights, module, &l);
    }
    let tokens = [7, 250, 33, 101, 5, 64, 64, 12, 199];
    let hidden = |base: &Base, hook| {
        let sequences = vec![Sequence { tokens: &tokens, branches: &[], hook, cache: None }];
        base.forward(&mut Batch { sequences, train: None }).unwrap()
    };
    let found = hidden(&base, Some(methods::load(&method.export().unwrap(), &base).unwrap()));
    safetensors::save(&weights, dir.path().join("scaled")).unwrap();
    drop(base);
    fs::rename(dir.path().join("scaled"), dir.path().join("model.safetensors")).unwrap();
    let expected = hidden(&Base::open("scaled", dir.path()).unwrap(), None);
    let apart = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    assert!(apart.to_scalar::<f32>().unwrap() < 1e-4, "{family} {adapter}: {apart}");
}

fn scale(weights: &mut HashMap<String, Tensor>, module: &str, l: &Tensor) {
    let mut times = |name: String, l: &Tensor| {
        if let Some(weight) = weights.get_mut(&name) {
            *weight = weight.broadcast_mul(l).unwrap();
        }
    };
    times(format!("{module}.weight"), l);
    if l.dims()[1] == 1 {
        times(format!("{module}.bias"), &l.flatten_all().unwrap());
    }
}
