//! Balance and choices on numbers that can be checked by hand.

use candle_core::{Device, Tensor, Var};

use super::{
    adamole::Threshold,
    balance::switch_balance,
    loramoe::All,
    router::{Choice, Gate, Routing, Scores},
    top_k::TopK,
};
use crate::model::At;

const CPU: Device = Device::Cpu;

fn scores<const N: usize>(x: &Tensor, p: [[f32; 3]; N]) -> Scores<'_> {
    let p = Tensor::new(&p, &CPU).unwrap();
    Scores { x, values: p.to_vec2().unwrap(), p }
}

fn at(lengths: &[usize]) -> At<'_> {
    At { layer: 0, lengths, train: Some(1) }
}

fn number(x: &Tensor) -> f32 {
    x.to_scalar().unwrap()
}

#[test]
fn the_balance_of_a_uniform_router_is_k() {
    let p = Tensor::full(0.25f32, (6, 4), &CPU).unwrap();
    // Each row has two of four experts, all experts the same number of rows.
    let active: Vec<bool> = (0..6).flat_map(|row| (0..4).map(move |e| (row + e) % 2 == 0)).collect();
    let choice = Choice { weights: p.clone(), active: Some(active) };
    assert!((number(&switch_balance(&p, &choice).unwrap()) - 2.0).abs() < 1e-6);
    // All rows at one expert, and its probability 1: E times one.
    let one = Tensor::new(&[[1f32, 0., 0., 0.], [1., 0., 0., 0.]], &CPU).unwrap();
    let active = Some([[true, false, false, false]; 2].concat());
    let choice = Choice { weights: one.clone(), active };
    assert_eq!(number(&switch_balance(&one, &choice).unwrap()), 4.0);
}

#[test]
fn the_chosen_weights_sum_to_one() {
    let x = Tensor::zeros((2, 3), candle_core::DType::F32, &CPU).unwrap();
    let choice = TopK(2).choose(&scores(&x, [[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])).unwrap();
    let weights: Vec<Vec<f32>> = choice.weights.to_vec2().unwrap();
    for (found, expected) in weights.concat().iter().zip([0.625, 0.0, 0.375, 0.0, 2.0 / 3.0, 1.0 / 3.0]) {
        assert!((found - expected).abs() < 1e-6, "{weights:?}");
    }
    // A threshold of σ(0) · 0.3 = 0.15: what exceeds it, in proportion.
    let threshold = Threshold {
        weight: Tensor::ones((1, 3), candle_core::DType::F32, &CPU).unwrap(),
        bias: Tensor::zeros(1, candle_core::DType::F32, &CPU).unwrap(),
        max: 0.3,
    };
    let scores = scores(&x, [[0.5, 0.1, 0.4], [0.15, 0.15, 0.15]]);
    let choice = threshold.choose(&scores).unwrap();
    let weights: Vec<Vec<f32>> = choice.weights.to_vec2().unwrap();
    for (found, expected) in weights.concat().iter().zip([0.35 / 0.6, 0.0, 0.25 / 0.6, 0.0, 0.0, 0.0]) {
        assert!((found - expected).abs() < 1e-6, "{weights:?}");
    }
    assert_eq!(choice.active.as_deref(), Some([true, false, true, false, false, false].as_slice()));
    // f = (½, 0, ½), P = (0.175, 0, 0.125).
    let balance = number(&threshold.balance(at(&[2]), &scores, &choice).unwrap());
    assert!((balance - 3.0 * 0.5 * (0.175 + 0.125)).abs() < 1e-6, "{balance}");
}

#[test]
fn the_localised_balance_does_not_see_lengths() {
    let x = Tensor::zeros((3, 1), candle_core::DType::F32, &CPU).unwrap();
    let even = scores(&x, [[1.0 / 3.0; 3]; 3]);
    let choice = All.choose(&even).unwrap();
    assert!(number(&All.balance(at(&[1, 2]), &even, &choice).unwrap()).abs() < 1e-9);
    // Sequences (row 0) and (rows 1, 2): Q = (1, 0, 0) and (0, ½, ½); mean ⅓, Σ(Q − ⅓)² = 5/6, over 5 numbers.
    let split = scores(&x, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]);
    let found = number(&All.balance(at(&[1, 2]), &split, &choice).unwrap());
    assert!((found - 9.0 / 6.0).abs() < 1e-5, "{found}");
}

#[test]
fn pairs_go_out_and_come_back() {
    let weights = Var::new(&[[0.5f32, 0.0, 0.5], [0.0, 1.0, 0.0]], &CPU).unwrap();
    let active = Some(vec![true, false, true, false, true, false]);
    let routing = Routing::new(&Choice { weights: weights.as_tensor().clone(), active }).unwrap();
    assert_eq!(routing.counts(), [1, 1, 1]);
    let x = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &CPU).unwrap();
    let gathered = routing.gather(&x).unwrap();
    assert_eq!(gathered.to_vec2::<f32>().unwrap(), [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]);
    let z = Tensor::new(&[[10f32, 0.0], [20.0, 2.0], [30.0, 4.0]], &CPU).unwrap();
    let sum = routing.add(&x, &z).unwrap();
    assert_eq!(sum.to_vec2::<f32>().unwrap(), [[21.0, 4.0], [23.0, 6.0]]);
    let gradients = sum.sum_all().unwrap().backward().unwrap();
    let gradient = gradients.get(&weights).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(gradient, [[10.0, 0.0, 34.0], [0.0, 22.0, 0.0]]);
}
