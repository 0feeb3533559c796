//! PiSSA against PEFT, which decomposes the same matrices and trains the residual form. Singular vectors have no sign
//! of their own, so products are compared.

use std::sync::Arc;

use attune::{
    domain::MethodSpec,
    methods,
    model::{Base, Batch, Hook, Sequence},
};
use candle_core::{Device, Tensor, quantized::GgmlDType, safetensors};
use serde_json::json;

use crate::{
    golden::{adapter, base, fixture, forward, largest_difference, numbers, read, rows},
    support::{
        quantised,
        tiny::Tiny,
        training::{From, create, finish, spec},
    },
};

const MODULES: [&str; 4] =
    ["layers.0.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"];

/// `B A` of a module in a file's bytes.
fn product(weights: &[u8], module: &str) -> Tensor {
    let tensors = safetensors::load_buffer(weights, &Device::Cpu).unwrap();
    let get = |part: &str| &tensors[&format!("base_model.model.model.{module}.{part}.weight")];
    get("lora_B").matmul(get("lora_A")).unwrap()
}

#[test]
fn pissa_learns_as_pefts_does() {
    let (base, rows, trajectory) = (base(), rows(), read("lora_pissa/traj.json"));
    let training = json!({"n_epochs": 20, "batch_size": 4, "learning_rate": 1e-3, "lr_scheduler": "constant",
                          "weight_decay": 0.01});
    let adapter_spec = json!({"type": "lora", "r": 4, "alpha": 4, "target_modules": ["q_proj", "down_proj"],
                              "init_lora_weights": "pissa"});
    let spec = spec(&base, adapter_spec, training);
    let (first, last) = (adapter("lora_pissa/adapter_init"), adapter("lora_pissa/adapter_final"));
    let fresh = create(&spec.adapter, &base, 5).variables();
    let fresh: Vec<Tensor> = fresh.chunks(2).map(|pair| pair[1].1.matmul(&pair[0].1).unwrap()).collect();
    for (module, fresh) in MODULES.iter().zip(&fresh) {
        assert!(largest_difference(fresh, &product(&first.weights, module)) < 1e-6, "{module}");
    }

    let (finished, recorder) = finish(&base, &spec, &rows, From::default());
    for (name, found) in [("loss", recorder.losses()), ("grad_norm", recorder.norms())] {
        for (step, (found, expected)) in found.iter().zip(numbers(&trajectory[name])).enumerate() {
            assert!((found - expected).abs() < 5e-6, "{name} of step {}: {found} {expected}", step + 1);
        }
    }
    // What is stored is the difference, at scale 1.
    for module in MODULES {
        let moved = (product(&last.weights, module) - product(&first.weights, module)).unwrap();
        let ours = product(&finished.weights, module);
        assert!(largest_difference(&ours, &moved) < 1e-5, "{module}");
        assert!(moved.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 1e-3);
    }
    let hook = methods::load(&finished, &base).unwrap();
    let (hidden, _) = forward(&base, &rows, Some(hook.clone()));
    let found = base.logits(&hidden, Some(hook.as_ref())).unwrap();
    let expected = safetensors::load(fixture("lora_pissa/eval_logits.safetensors"), &Device::Cpu).unwrap();
    let mut start = 0;
    for (row, example) in rows.iter().enumerate() {
        let length = example.ids.len();
        let expected = expected["logits"].get(row).unwrap().narrow(0, 0, length).unwrap();
        assert!(largest_difference(&found.narrow(0, start, length).unwrap(), &expected) < 1e-5, "row {row}");
        start += length;
    }
}

fn hidden(base: &Base, hook: Option<Arc<dyn Hook>>) -> Tensor {
    let sequences = vec![Sequence { tokens: &[7, 250, 33, 101, 5], branches: &[], hook, cache: None }];
    base.forward(&mut Batch { sequences, train: None }).unwrap()
}

/// On a quantised base too, and with either scale.
#[test]
fn a_fresh_pissa_is_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("tiny.gguf");
    quantised::write(&Tiny::default(), &gguf, GgmlDType::Q4_1);
    let base = Base::open("quantised", &gguf).unwrap();
    for adapter in [
        json!({"r": 5, "alpha": 3, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}}),
        json!({"r": 5, "alpha": 3, "init_lora_weights": "pissa_niter_2", "use_rslora": true}),
    ] {
        let spec = MethodSpec::from_json(&adapter).unwrap();
        spec.check(&base.info).unwrap();
        let method = create(&spec, &base, 3);
        let alone = hidden(&base, None);
        assert!(largest_difference(&hidden(&base, Some(method.hook(None).unwrap())), &alone) < 1e-5);
        // A and B are no zeros that happen to do nothing, and a change of one is seen.
        let (_, a) = &method.variables()[0];
        a.set(&(a.as_tensor() * 1.5).unwrap()).unwrap();
        assert!(largest_difference(&hidden(&base, Some(method.hook(None).unwrap())), &alone) > 1e-2);
    }
}
