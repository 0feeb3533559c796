//! DoRA's arithmetic against dense matrices, with lengths that differ from the norms, biases and dropout.

use std::sync::Arc;

use attune::{
    domain::{MethodSpec, Site},
    methods::{self, Trainable},
    model::{At, Base, Linear},
};
use candle_core::{Device, Result, Tensor, Var, quantized::GgmlDType};
use serde_json::{Value, json};

use crate::support::{
    quantised,
    tiny::{Random, Tiny},
    training::create,
};

const CPU: Device = Device::Cpu;
const SCALE: f64 = 7.0 / 3.0;

/// Q with a bias, dense; and without, quantised.
fn bases() -> Vec<Arc<Base>> {
    let dir = tempfile::tempdir().unwrap();
    Tiny { model_type: "qwen2", ..Tiny::default() }.write(dir.path());
    let gguf = dir.path().join("tiny.gguf");
    quantised::write(&Tiny::default(), &gguf, GgmlDType::Q4_1);
    vec![Base::open("biased", dir.path()).unwrap(), Base::open("quantised", &gguf).unwrap()]
}

fn noise(shape: (usize, usize), seed: u64) -> Tensor {
    let mut random = Random(seed);
    Tensor::from_vec((0..shape.0 * shape.1).map(|_| random.normal()).collect::<Vec<_>>(), shape, &CPU).unwrap()
}

fn method(adapter: Value, base: &Base) -> Box<dyn Trainable> {
    let spec = MethodSpec::from_json(&adapter).unwrap();
    spec.check(&base.info).unwrap();
    create(&spec, base, 1)
}

fn at(train: Option<u64>) -> At<'static> {
    At { layer: 0, lengths: &[5], train }
}

/// A, B and m of layer 0's Q, far from where they began; m is around the norms.
fn shaken(method: &dyn Trainable) -> [Var; 3] {
    let variables = method.variables();
    let find = |end: &str| {
        let name = format!("base_model.model.model.layers.0.self_attn.q_proj.{end}");
        variables.iter().find(|(found, _)| *found == name).unwrap().1.clone()
    };
    let all = [find("lora_A.weight"), find("lora_B.weight"), find("lora_magnitude_vector")];
    for (variable, seed) in all[..2].iter().zip(1..) {
        let (rows, cols) = variable.dims2().unwrap();
        variable.set(&(noise((rows, cols), seed) * 0.3).unwrap()).unwrap();
    }
    let spread = (noise((1, 64), 3).squeeze(0).unwrap() * 0.3).unwrap();
    all[2].set(&(all[2].as_tensor() * (spread + 1.0).unwrap()).unwrap()).unwrap();
    all
}

/// What dropout leaves of `x` at this place: LoRA with A = B = I adds it to the base's output.
fn dropped(x: &Tensor, base: &Base, key: u64) -> Tensor {
    let lora = method(json!({"r": 64, "alpha": 64, "dropout": 0.4, "target_modules": ["q_proj"]}), base);
    let identity = Tensor::eye(64, candle_core::DType::F32, &CPU).unwrap();
    lora.variables().iter().for_each(|(_, variable)| variable.set(&identity).unwrap());
    let ones = x.ones_like().unwrap();
    let linear = base.linear(0, Site::Q);
    let hook = lora.hook(Some(key)).unwrap();
    let sum = hook.linear(at(Some(key)), Site::Q, &ones, linear).unwrap();
    let kept = (sum - linear.forward(&ones).unwrap()).unwrap().gt(0.5).unwrap();
    (x * (kept.to_dtype(candle_core::DType::F32).unwrap() / 0.6).unwrap()).unwrap()
}

/// The formulas of PEFT's `dora.py`, with W made dense and the norm cut out of the graph.
fn plain(x: &Tensor, dropped: Option<&Tensor>, [a, b, m]: &[Var; 3], linear: &Linear) -> Result<Tensor> {
    let w = linear.dequantize()?;
    let bias = match linear.bias() {
        Some(bias) => Tensor::new(bias.to_vec(), &CPU)?,
        None => Tensor::zeros(64, candle_core::DType::F32, &CPU)?,
    };
    let changed = (&w + (b.matmul(a)? * SCALE)?)?.detach();
    let g = (m.as_tensor() / changed.sqr()?.sum(1)?.sqrt()?)?;
    let delta = |x: &Tensor| (x.matmul(&a.t()?)?.matmul(&b.t()?)? * SCALE)?.broadcast_mul(&g);
    let frozen = |x: &Tensor| x.matmul(&w.t()?);
    let sum = match dropped {
        None => (frozen(x)?.broadcast_mul(&g)? + delta(x)?)?,
        Some(dropped) => ((frozen(x)? + frozen(dropped)?.broadcast_mul(&(&g - 1.0)?)?)? + delta(dropped)?)?,
    };
    sum.broadcast_add(&bias)
}

fn far(a: &Tensor, b: &Tensor) -> f32 {
    let most = |x: &Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    most(&(a - b).unwrap()) / most(b).max(1e-3)
}

#[test]
fn dora_is_its_formula_forward_and_backward() {
    for base in bases() {
        for key in [None, Some(77)] {
            let adapter = json!({"type": "dora", "r": 3, "alpha": 7, "dropout": 0.4, "target_modules": ["q_proj"]});
            let method = method(adapter, &base);
            let variables = shaken(method.as_ref());
            let (x, linear) = (Var::from_tensor(&noise((5, 64), 4)).unwrap(), base.linear(0, Site::Q));
            let dropped = key.map(|key| dropped(&x, &base, key));
            if let Some(dropped) = &dropped {
                let zeros =
                    dropped.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().filter(|x| **x == 0.0).count();
                assert!((80..180).contains(&zeros), "{zeros} of 320 dropped");
            }
            let expected = plain(&x, dropped.as_ref(), &variables, linear).unwrap();
            let hook = method.hook(key).unwrap();
            let found = hook.linear(at(key), Site::Q, &x, linear).unwrap();
            let beside = hook.adjust(at(key), Site::Q, &x, linear.forward(&x).unwrap(), linear).unwrap();
            assert!(far(&found, &expected) < 1e-5, "{} {key:?}: {}", base.info.id, far(&found, &expected));
            assert!(far(&beside, &expected) < 1e-5, "{} {key:?}, adjusted", base.info.id);
            let weights = noise((5, 64), 5);
            let gradients = |y: &Tensor| (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            let (ours, theirs) = (gradients(&found), gradients(&expected));
            for (name, variable) in ["x", "A", "B", "m"].iter().zip([&x].into_iter().chain(&variables)) {
                let apart = far(ours.get(variable).unwrap(), theirs.get(variable).unwrap());
                assert!(apart < 1e-5, "{} {key:?}: gradient of {name}: {apart}", base.info.id);
            }
        }
    }
}

/// At the start m is the norm, so that the adapter is the base, bias and all.
#[test]
fn lengths_begin_at_the_norms() {
    for base in bases() {
        let method = method(json!({"type": "dora", "r": 3, "alpha": 7}), &base);
        let m = method.variables().into_iter().filter(|(name, _)| name.ends_with("lora_magnitude_vector"));
        for ((_, m), (layer, site)) in m.zip(base.info.linears()) {
            let w = base.linear(layer, site).dequantize().unwrap();
            let norms = w.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
            assert!(far(m.as_tensor(), &norms) < 1e-6);
        }
        let x = noise((5, 64), 4);
        let linear = base.linear(0, Site::Q);
        let hook = methods::load(&method.export().unwrap(), &base).unwrap();
        let (found, alone) = (hook.linear(at(None), Site::Q, &x, linear).unwrap(), linear.forward(&x).unwrap());
        assert_eq!(found.to_vec2::<f32>().unwrap(), alone.to_vec2::<f32>().unwrap());
    }
}

/// What acts in linears of the layers only is made in one op with the LoRAs of a batch; what does not is not.
#[test]
fn it_is_served_beside_loras_in_one_op() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    let base = Base::open("tiny", dir.path()).unwrap();
    for (adapter, is_one) in [
        (json!({"type": "lora", "r": 2}), true),
        (json!({"type": "dora", "r": 2}), true),
        (json!({"type": "dora", "r": 2, "target_modules": ["q_proj", "lm_head"]}), false),
        (json!({"type": "ia3"}), true),
        (json!({"type": "ia3", "target_modules": "all-linear", "feedforward_modules": ["up_proj"]}), false),
    ] {
        let files = create(&MethodSpec::from_json(&adapter).unwrap(), &base, 1).export().unwrap();
        let hook = methods::load(&files, &base).unwrap();
        assert_eq!(hook.served().is_some(), is_one, "{adapter}");
    }
}
