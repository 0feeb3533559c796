//! What is served against candle's plain ops, on random numbers: within a rounding in f32, and near in int8.

use candle_core::{D, Device};

use super::*;
use crate::model::{Compute, kernels::tests::random, ops::Activation};

const CPU: Device = Device::Cpu;
const HIDDEN: usize = 64;
const WIDTH: usize = 96;

fn tensor(rows: usize, cols: usize, seed: u64) -> Tensor {
    Tensor::from_vec(random(rows * cols, seed), (rows, cols), &CPU).unwrap()
}

fn numbers(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn near(found: &Tensor, expected: &Tensor, tolerance: f32, what: &str) {
    let apart = (found - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let size = expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(apart < tolerance * size, "{what}: {apart} of {size}");
}

fn sigmoid(x: &Tensor, gate: &Gate) -> Tensor {
    let w = Tensor::from_slice(&gate.weight, (gate.weight.len(), 1), &CPU).unwrap();
    candle_nn::ops::sigmoid(&(x.matmul(&w).unwrap() + f64::from(gate.bias)).unwrap()).unwrap()
}

/// What each is checked in, and how near it has to come.
const COMPUTES: [(Compute, f32); 2] = [(Compute::F32, 1e-5), (Compute::Int8, 2e-2)];

fn low_rank(inputs: usize, outputs: usize, r: usize, seed: u64, compute: Compute) -> (LowRank, Tensor) {
    let (a, b) = (tensor(r, inputs, seed), tensor(outputs, r, seed + 1));
    let change = b.matmul(&a).unwrap().affine(1.5, 0.0).unwrap();
    (LowRank::new(numbers(&a), &numbers(&b), (outputs, inputs), 1.5, compute), change.t().unwrap())
}

/// Rows 2..5 of 7 change, each as if it were alone, and no other.
fn check(found: &Tensor, expected: &Tensor, before: &Tensor, alone: impl Fn(usize) -> Tensor, tolerance: f32) {
    near(&found.narrow(0, 2, 3).unwrap(), &expected.narrow(0, 2, 3).unwrap(), tolerance, "changed rows");
    for row in [0, 1, 5, 6] {
        assert_eq!(numbers(&found.get(row).unwrap()), numbers(&before.get(row).unwrap()), "row {row}");
    }
    for row in 2..5 {
        assert_eq!(numbers(&found.get(row).unwrap()), numbers(&alone(row)), "row {row} alone");
    }
}

#[test]
fn a_gated_change_counts_as_its_gate_says() {
    for (compute, tolerance) in COMPUTES {
        let (change, delta) = low_rank(HIDDEN, WIDTH, 5, 1, compute);
        let gate = Gate { weight: random(HIDDEN, 3), bias: 0.3 };
        let (x, y) = (tensor(7, HIDDEN, 4), tensor(7, WIDTH, 5));
        let expected = (&y + x.matmul(&delta).unwrap().broadcast_mul(&sigmoid(&x, &gate)).unwrap()).unwrap();
        let change = change.gated(gate);
        let of = |x: &Tensor, y: &Tensor, rows| add_low_rank(x, y.copy().unwrap(), &[(rows, &change)]).unwrap();
        let part = |x: &Tensor, row| x.narrow(0, row, 1).unwrap().contiguous().unwrap();
        check(&of(&x, &y, 2..5), &expected, &y, |row| of(&part(&x, row), &part(&y, row), 0..1), tolerance);
    }
}

#[test]
fn a_bottleneck_adds_to_the_block() {
    for (compute, tolerance) in COMPUTES {
        let affine = |rows: usize, cols: usize, seed| {
            let affine = Affine { weight: random(rows * cols, seed), bias: random(rows, seed + 1) };
            let w = Tensor::from_slice(&affine.weight, (rows, cols), &CPU).unwrap().t().unwrap();
            let b = Tensor::from_slice(&affine.bias, (1, rows), &CPU).unwrap();
            (affine, move |x: &Tensor| x.matmul(&w).unwrap().broadcast_add(&b).unwrap())
        };
        let ((down, through_down), (up, through_up)) = (affine(9, HIDDEN, 10), affine(HIDDEN, 9, 12));
        let gate = Gate { weight: random(HIDDEN, 14), bias: -0.2 };
        let (x, m) = (tensor(7, HIDDEN, 15), tensor(7, HIDDEN, 16));
        let u = (&x + &m).unwrap();
        let change = through_up(&through_down(&u).relu().unwrap());
        let expected = (&m + change.broadcast_mul(&sigmoid(&u, &gate)).unwrap()).unwrap();
        let bottleneck = Bottleneck::new(down, up, gate, compute);
        let of = |x: &Tensor, m: &Tensor, rows| bottleneck::add(x, m.copy().unwrap(), &[(rows, &bottleneck)]).unwrap();
        let part = |x: &Tensor, row| x.narrow(0, row, 1).unwrap().contiguous().unwrap();
        check(&of(&x, &m, 2..5), &expected, &m, |row| of(&part(&x, row), &part(&m, row), 0..1), tolerance);
    }
}

#[test]
fn a_mixture_weighs_whole_blocks() {
    const EXPERTS: usize = 3;
    for (compute, tolerance) in COMPUTES {
        let experts = |inputs, outputs, seed: u64| -> (Vec<LowRank>, Vec<Tensor>) {
            (0..EXPERTS as u64).map(|e| low_rank(inputs, outputs, 4, seed + 10 * e, compute)).unzip()
        };
        let (gates, up, down) = (experts(HIDDEN, WIDTH, 100), experts(HIDDEN, WIDTH, 200), experts(WIDTH, HIDDEN, 300));
        let router = tensor(EXPERTS, HIDDEN, 20);
        // The least probable expert rests.
        let choose = |p: &[f32]| -> Vec<f32> {
            let least = p.iter().copied().fold(f32::INFINITY, f32::min);
            p.iter().map(|p| if *p == least { 0.0 } else { p / (1.0 - least) }).collect()
        };
        let (h, gate, up_rows) = (tensor(7, HIDDEN, 21), tensor(7, WIDTH, 22), tensor(7, WIDTH, 23));
        let z = (gate.silu().unwrap() * &up_rows).unwrap();
        let p = candle_nn::ops::softmax(&h.matmul(&router.t().unwrap()).unwrap(), D::Minus1).unwrap();
        let weights: Vec<f32> = p.to_vec2::<f32>().unwrap().iter().flat_map(|p| choose(p)).collect();
        let weights = Tensor::from_vec(weights, (7, EXPERTS), &CPU).unwrap();
        let (mut mixed, mut product) = (z.zeros_like().unwrap(), h.zeros_like().unwrap());
        for e in 0..EXPERTS {
            let changed = |y: &Tensor, delta: &Tensor| (y + h.matmul(delta).unwrap()).unwrap();
            let own = (changed(&gate, &gates.1[e]).silu().unwrap() * changed(&up_rows, &up.1[e])).unwrap();
            let weight = weights.narrow(1, e, 1).unwrap();
            mixed = (mixed + own.broadcast_mul(&weight).unwrap()).unwrap();
            product = (product + own.matmul(&down.1[e]).unwrap().broadcast_mul(&weight).unwrap()).unwrap();
        }
        let (gate_experts, up_experts, down_experts) = (gates.0, up.0, down.0);
        let (router, choose) = (numbers(&router), Box::new(choose));
        let mixture = Mixture { router, choose, gate: gate_experts, up: up_experts, down: down_experts };
        let y = tensor(7, HIDDEN, 24);
        let of = |rows: Range<usize>, mixed: Range<usize>| {
            let part = |x: &Tensor| x.narrow(0, rows.start, rows.len()).unwrap().copy().unwrap();
            let frozen = Products { gate: part(&gate), up: part(&up_rows), z: part(&z) };
            let owner = [(mixed, &mixture)];
            let extra = mixture::mix(&part(&h), &frozen, Activation::Silu, &owner).unwrap();
            (frozen.z, mixture::complete(part(&y), &extra, &owner).unwrap())
        };
        let ((z_found, y_found), alone) = (of(0..7, 2..5), |row: usize| of(row..row + 1, 0..1));
        check(&z_found, &mixed, &z, |row| alone(row).0, tolerance);
        check(&y_found, &(&y + product).unwrap(), &y, |row| alone(row).1, tolerance);
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (change, _) = low_rank(HIDDEN, WIDTH, 5, 1, Compute::Int8);
    let of = |x: usize, rows| add_low_rank(&tensor(3, x, 1), tensor(3, WIDTH, 2), &[(rows, &change)]);
    assert!(of(HIDDEN, 0..3).is_ok());
    assert!(of(HIDDEN, 0..4).is_err());
    assert!(of(HIDDEN + 1, 0..3).is_err());
    let twice = [(0..2, &change), (1..3, &change)];
    assert!(add_low_rank(&tensor(3, HIDDEN, 1), tensor(3, WIDTH, 2), &twice).is_err());
}
