use std::{collections::BTreeSet, sync::Arc};

use candle_core::{Device, Tensor, Var};

use super::{
    optim::{AdamW, Gradient, Step},
    order,
    plan::Plan,
    schedule::learning_rate,
};
use crate::{
    domain::{BaseInfo, MethodSpec, Training, TrainingRequest, spec::Schedule},
    methods::{AdapterFiles, MethodError, Trainable},
    model::{Frozen, Hook},
};

fn training() -> Training {
    let base = BaseInfo {
        id: "b".into(),
        hash: String::new(),
        architecture: "llama".into(),
        storage: "F32".into(),
        hidden: 8,
        intermediate: 8,
        layers: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
        vocab: 8,
        context: 64,
        short_context: None,
        tied: true,
        parameters: 1,
        has_chat_template: false,
    };
    Training::resolve(&TrainingRequest::default(), &MethodSpec::default(), &base, 64).unwrap()
}

#[test]
fn schedules_rise_and_fall() {
    let with =
        |schedule, warmup_ratio| Training { learning_rate: 0.5, lr_scheduler: schedule, warmup_ratio, ..training() };
    let rates = |training: &Training| -> Vec<f64> { (0..8).map(|step| learning_rate(training, step, 8)).collect() };
    assert_eq!(rates(&with(Schedule::Constant, 0.25)), [0.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]);
    let linear: Vec<f64> = (0..8).map(|step| 0.5 * (1.0 - step as f64 / 8.0)).collect();
    assert_eq!(rates(&with(Schedule::Linear, 0.0)), linear);
    let cosine = rates(&with(Schedule::Cosine, 0.0));
    assert!((cosine[4] - 0.25).abs() < 1e-12 && cosine[0] == 0.5 && cosine.is_sorted_by(|a, b| a > b));
}

#[test]
fn epochs_are_different_permutations() {
    let (a, b) = (order::epoch(3, 0, 50), order::epoch(3, 1, 50));
    assert_eq!(a, order::epoch(3, 0, 50));
    assert_ne!(a, b);
    assert_ne!(a, order::epoch(4, 0, 50));
    for order in [a, b] {
        assert_eq!(order.into_iter().collect::<BTreeSet<_>>(), (0..50).collect());
    }
    let (train, held) = order::holdout(3, 0.2, 50);
    assert_eq!((train.len(), held.len()), (40, 10));
    assert_eq!(train.into_iter().chain(held).collect::<BTreeSet<_>>(), (0..50).collect());
    assert_eq!(order::holdout(3, 0.01, 5).1.len(), 1);
    assert_eq!(order::holdout(3, 0.0, 5).1.len(), 0);
}

#[test]
fn each_epoch_uses_each_row_once() {
    let training = Training { n_epochs: 2, batch_size: 3, grad_accumulation: 2, ..training() };
    let plan = Plan::new(&training, 13);
    let places: Vec<_> = (0..plan.total_steps).map(|step| plan.rows_of(step)).collect();
    assert_eq!(places, [(0, 0..6), (0, 6..12), (0, 12..13), (1, 0..6), (1, 6..12), (1, 12..13)]);
    assert_eq!((1..=6).filter(|step| plan.is_epoch_end(*step)).collect::<Vec<_>>(), [3, 6]);
    let short = Training { max_steps: Some(4), ..training };
    assert_eq!(Plan::new(&short, 13).total_steps, 4);
}

/// A method without wishes of its own.
struct Plain;

impl Trainable for Plain {
    fn hook(&self, _: Option<u64>) -> candle_core::Result<Arc<dyn Hook>> {
        Ok(Arc::new(Frozen))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        Vec::new()
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        Ok(AdapterFiles::default())
    }
}

/// Against the formula in double precision.
#[test]
fn adamw_follows_the_formula() {
    let start = [0.3f32, -1.2, 2.5];
    let gradients = [[0.1f32, -0.4, 0.02], [-0.3, -0.5, 0.07]];
    let (rate, decay) = (0.01f64, 0.1f64);
    let variable = Var::from_tensor(&Tensor::new(&start, &Device::Cpu).unwrap()).unwrap();
    let variables = vec![("w".to_owned(), variable.clone())];
    let mut adam = AdamW::new(&variables, decay);
    let (mut w, mut m, mut v) = (start.map(f64::from), [0f64; 3], [0f64; 3]);
    for (t, values) in gradients.iter().enumerate() {
        let loss = (variable.as_tensor() * Tensor::new(values, &Device::Cpu).unwrap()).unwrap().sum_all().unwrap();
        let mut gradient = Gradient::zero(&variables);
        gradient.add(&variables, &loss.backward().unwrap()).unwrap();
        assert_eq!(gradient.values[0], values);
        let t = t as u64 + 1;
        adam.update(&variables, &gradient, Step { t, rate }, &Plain).unwrap();
        for i in 0..3 {
            let g = f64::from(values[i]);
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            let (mean, square) = (m[i] / (1.0 - 0.9f64.powf(t as f64)), v[i] / (1.0 - 0.999f64.powf(t as f64)));
            w[i] = w[i] * (1.0 - rate * decay) - rate * mean / (square.sqrt() + 1e-8);
        }
    }
    let got = variable.to_vec1::<f32>().unwrap();
    assert!(got.iter().zip(w).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6), "{got:?} {w:?}");

    let mut gradient = Gradient::zero(&variables);
    let loss = (variable.as_tensor() * 2.0).unwrap().sum_all().unwrap();
    gradient.add(&variables, &loss.backward().unwrap()).unwrap();
    let norm = gradient.norm();
    assert!((norm - 12f64.sqrt()).abs() < 1e-12);
    gradient.clip(norm, 0.0);
    gradient.clip(norm, 5.0);
    assert_eq!(gradient.values[0], [2.0; 3]);
    gradient.clip(norm, 1.0);
    assert!((gradient.norm() - 1.0).abs() < 1e-6);
}
