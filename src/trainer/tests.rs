use std::collections::BTreeSet;

use candle_core::{Device, Tensor, Var};

use super::{gradient::Gradient, order, plan::Plan, schedule::learning_rate};
use crate::domain::{BaseInfo, MethodSpec, Training, TrainingRequest, spec::Schedule};

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

#[test]
fn gradients_add_up_and_are_clipped() {
    let variable = Var::from_tensor(&Tensor::new(&[0.3f32, -1.2, 2.5], &Device::Cpu).unwrap()).unwrap();
    let variables = vec![("w".to_owned(), variable.clone())];
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
