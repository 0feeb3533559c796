use candle_core::{Device, Tensor, safetensors};

use super::*;
use crate::{
    methods::{AdapterFiles, MethodError},
    model::{Frozen, Hook},
};
use std::sync::Arc;

/// A method without wishes of its own.
struct Plain;

impl Trainable for Plain {
    fn hook(&self, _: Option<u64>) -> Result<Arc<dyn Hook>> {
        Ok(Arc::new(Frozen))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        Vec::new()
    }

    fn export(&self) -> std::result::Result<AdapterFiles, MethodError> {
        Ok(AdapterFiles::default())
    }
}

fn variables(start: &[f32]) -> Vec<(String, Var)> {
    vec![("w".to_owned(), Var::from_tensor(&Tensor::new(start, &Device::Cpu).unwrap()).unwrap())]
}

/// Against the formula in double precision.
#[test]
fn adamw_follows_the_formula() {
    let start = [0.3f32, -1.2, 2.5];
    let gradients = [[0.1f32, -0.4, 0.02], [-0.3, -0.5, 0.07]];
    let (rate, decay) = (0.01f64, 0.1f64);
    let variables = variables(&start);
    let mut adam = AdamW::new(&variables, Optimizer::Adamw, decay);
    let (mut w, mut m, mut v) = (start.map(f64::from), [0f64; 3], [0f64; 3]);
    for (t, values) in gradients.iter().enumerate() {
        let t = t as u64 + 1;
        let gradient = Gradient { values: vec![values.to_vec()] };
        adam.update(&variables, &gradient, Step { t, rate, peak: rate }, &Plain).unwrap();
        for i in 0..3 {
            let g = f64::from(values[i]);
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            let (mean, square) = (m[i] / (1.0 - 0.9f64.powf(t as f64)), v[i] / (1.0 - 0.999f64.powf(t as f64)));
            w[i] = w[i] * (1.0 - rate * decay) - rate * mean / (square.sqrt() + 1e-8);
        }
    }
    let got = variables[0].1.to_vec1::<f32>().unwrap();
    assert!(got.iter().zip(w).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6), "{got:?} {w:?}");
}

/// Ten steps of bitsandbytes' own, by `tests/fixtures/adamw_8bit/make.py`.
#[test]
fn eight_bits_are_those_of_bitsandbytes() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/adamw_8bit/steps.safetensors");
    let there = safetensors::load(path, &Device::Cpu).unwrap();
    let floats = |name: &str| there[name].to_vec1::<f32>().unwrap();
    for (map, name) in [(Map::signed(), "signed"), (Map::unsigned(), "unsigned")] {
        let mut values = [0.0; 256];
        dequantise(map, &std::array::from_fn::<u8, 256, _>(|code| code as u8), 1.0, &mut values);
        let apart = values.iter().zip(floats(name)).map(|(a, b)| (a - b).abs() / b.abs().max(1e-9));
        assert!(apart.fold(0.0, f32::max) < 1e-6, "{name}");
    }

    let (start, table) = (floats("start"), floats("gradients"));
    let variables = variables(&start);
    let mut adam = AdamW::new(&variables, Optimizer::Adamw8bit, 0.1);
    for t in 0..10 {
        let g = |i: usize| table[(7 * i + 131 * t) % table.len()] * 10f32.powi(-(i as i32 / 256 % 5));
        let gradient = Gradient { values: vec![(0..start.len()).map(g).collect()] };
        adam.update(&variables, &gradient, Step { t: t as u64 + 1, rate: 1e-2, peak: 1e-2 }, &Plain).unwrap();
    }
    let Moments::Blockwise { m, v } = &adam.moments[0] else { panic!("{} numbers stay in f32", start.len()) };
    for (ours, name) in [(m, "m"), (v, "v")] {
        let codes = there[name].to_vec1::<u8>().unwrap();
        let apart: Vec<u8> = ours.codes.iter().zip(&codes).map(|(a, b)| a.abs_diff(*b)).collect();
        let other = apart.iter().filter(|n| **n > 0).count();
        assert!(apart.iter().all(|n| *n <= 1) && other < 10, "{name}: {other} codes differ");
        assert!(codes.iter().collect::<std::collections::BTreeSet<_>>().len() > 100);
        let scales = floats(&format!("{name}_scales"));
        assert!(ours.scales.iter().zip(&scales).all(|(a, b)| (a - b).abs() < 1e-6 * b), "{name}");
    }
    let weights = variables[0].1.to_vec1::<f32>().unwrap();
    // Where a code differs, and only there, the weight does too: by less than one step.
    let apart: Vec<f32> = weights.iter().zip(floats("weight")).map(|(a, b)| (a - b).abs()).collect();
    let (largest, other) = (apart.iter().copied().fold(0.0, f32::max), apart.iter().filter(|d| **d > 1e-5).count());
    assert!(largest < 1e-2 && other < 20 && weights != start, "{largest} {other}");
}

#[test]
fn small_tensors_and_zeros_in_eight_bits() {
    let small = variables(&vec![1.0; LEAST_8BIT - 1]);
    assert!(matches!(AdamW::new(&small, Optimizer::Adamw8bit, 0.0).moments[0], Moments::Full { .. }));
    let zeros = variables(&vec![0.0; LEAST_8BIT]);
    let mut adam = AdamW::new(&zeros, Optimizer::Adamw8bit, 0.0);
    adam.update(&zeros, &Gradient::zero(&zeros), Step { t: 1, rate: 0.1, peak: 0.1 }, &Plain).unwrap();
    assert_eq!(zeros[0].1.to_vec1::<f32>().unwrap(), vec![0.0; LEAST_8BIT]);
}
