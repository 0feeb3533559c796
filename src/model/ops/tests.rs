//! Every fused op against candle's plain ops, values and gradients, on uneven shapes.

use candle_core::{D, DType, Device, Tensor, Var};

use super::*;
use crate::{
    formats::Storage as Stored,
    model::{Compute, Target, cache::PAGE, weight::Weight},
};
use std::sync::Arc;

const CPU: Device = Device::Cpu;

/// Numbers in `[-1, 1)` from a seed.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn var(shape: (usize, usize), seed: u32) -> Var {
    Var::from_vec(numbers(shape.0 * shape.1, seed), shape, &CPU).unwrap()
}

/// A weight in a storage, from random bytes with small scales.
fn weight(storage: Stored, rows: usize, cols: usize, seed: u32) -> Arc<Weight> {
    let blocks = rows * cols / storage.block_len();
    let noise = numbers(blocks * storage.block_bytes(), seed);
    let bytes: Vec<u8> = match storage {
        Stored::F32 => noise[..blocks].iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => {
            let mut bytes: Vec<u8> = noise.iter().map(|x| (*x * 127.0) as i8 as u8).collect();
            let scales: &[usize] = match storage {
                Stored::Q6K => &[208],
                Stored::Q4_0 | Stored::Q5_0 | Stored::Q8_0 => &[0],
                _ => &[0, 2],
            };
            for block in bytes.chunks_mut(storage.block_bytes()) {
                for at in scales {
                    block[*at..at + 2].copy_from_slice(&half::f16::from_f32(0.003).to_le_bytes());
                }
            }
            bytes
        }
    };
    Arc::new(Weight::new(storage, rows, cols, bytes.into()))
}

fn dense(w: &Weight) -> Tensor {
    let mut data = vec![0.0; w.rows * w.cols];
    w.dequantize_rows(0, w.rows, &mut data);
    Tensor::from_vec(data, (w.rows, w.cols), &CPU).unwrap()
}

fn close(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) {
    let b = b.to_dtype(DType::F64).unwrap();
    let scale = b.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap().max(1e-3);
    let difference = (a.to_dtype(DType::F64).unwrap() - &b).unwrap().abs().unwrap().max_all().unwrap();
    let difference = difference.to_scalar::<f64>().unwrap() / scale;
    assert!(difference < tolerance, "{what}: {difference:e}");
}

/// Compares the values of two graphs over the same variables, and the gradients of `Σ y ⊙ g` with random `g`.
fn agree(ours: &Tensor, plain: &Tensor, vars: &[&Var], tolerance: f64, what: &str) {
    close(ours, plain, tolerance, what);
    let g = Tensor::from_vec(numbers(ours.elem_count(), 77), ours.shape(), &CPU).unwrap();
    let gradients = |y: &Tensor| {
        let g = g.to_dtype(y.dtype()).unwrap();
        (y * g).unwrap().sum_all().unwrap().backward().unwrap()
    };
    let (a, b) = (gradients(ours), gradients(plain));
    for (i, v) in vars.iter().enumerate() {
        let gradient = b.get(v).unwrap();
        assert!(
            gradient.abs().unwrap().max_all().unwrap().to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap() > 0.0
        );
        close(a.get(v).unwrap(), gradient, tolerance, &format!("{what}, gradient {i}"));
    }
}

fn f64s(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F64).unwrap()
}

const STORAGES: [Stored; 9] = [
    Stored::F32,
    Stored::Q4_0,
    Stored::Q4_1,
    Stored::Q5_0,
    Stored::Q5_1,
    Stored::Q8_0,
    Stored::Q4K,
    Stored::Q5K,
    Stored::Q6K,
];

/// bf16 rounds both factors to 8 bits: near the f32 product and its gradient, and not equal to it. Odd widths.
#[test]
fn frozen_linear_in_bf16() {
    for (storage, rows, cols) in [(Stored::F32, 97, 163), (Stored::Q4_1, 97, 160), (Stored::Q6K, 1033, 512)] {
        let w = weight(storage, rows, cols, 3);
        let narrow = Arc::new(w.computing(crate::model::Compute::Bf16));
        for m in [1, 7, 33] {
            let x = var((m, cols), 5);
            let plain = f64s(&x).matmul(&f64s(&dense(&w)).t().unwrap()).unwrap();
            let y = frozen_linear(&x, &narrow).unwrap();
            agree(&y, &plain, &[&x], 1e-2, storage.name());
            agree(
                &composed::frozen_linear(&x, &narrow.on(&CPU).unwrap(), None).unwrap(),
                &plain,
                &[&x],
                2e-2,
                "composed",
            );
            let exact: Vec<f32> = frozen_linear(&x, &w).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert_ne!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), exact);
        }
    }
}

#[test]
fn grouped_low_rank_is_each_experts_own_change() {
    let (counts, scale) = ([3, 0, 37, 1], 1.7);
    let x = var((41, 33), 1);
    let shaped = |shape: (usize, usize, usize), seed| {
        Var::from_vec(numbers(shape.0 * shape.1 * shape.2, seed), shape, &CPU).unwrap()
    };
    let (a, b) = (shaped((4, 3, 33), 2), shaped((4, 7, 3), 3));
    let y = grouped_low_rank(&x, &a, &b, &counts, scale).unwrap();
    let part = |expert: usize, start: usize| {
        let of = |t: &Tensor| f64s(t).get(expert).unwrap().t().unwrap();
        let x = f64s(&x).narrow(0, start, counts[expert]).unwrap();
        (x.matmul(&of(&a)).unwrap().matmul(&of(&b)).unwrap() * f64::from(scale)).unwrap()
    };
    let plain = Tensor::cat(&[part(0, 0), part(2, 3), part(3, 40)], 0).unwrap();
    agree(&y, &plain, &[&x, &a, &b], 1e-5, "grouped low rank");
    let y = composed::grouped_low_rank(&x, &a, &b, &counts, scale).unwrap();
    agree(&y, &plain, &[&x, &a, &b], 1e-5, "composed");
    assert!(grouped_low_rank(&x, &a, &b, &[3, 0, 37, 2], scale).is_err());
}

#[test]
fn trained_linears_have_both_gradients_and_rows_of_their_own() {
    let (x, w) = (var((71, 33), 1), var((5, 33), 2));
    let y = trained_linear(&x, &w).unwrap();
    let plain = f64s(&x).matmul(&f64s(&w).t().unwrap()).unwrap();
    agree(&y, &plain, &[&x, &w], 1e-5, "trained linear");
    let row = trained_linear(&x.narrow(0, 40, 1).unwrap(), &w).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(row, y.narrow(0, 40, 1).unwrap().to_vec2::<f32>().unwrap());
}

#[test]
fn frozen_linear_in_every_storage() {
    for storage in STORAGES {
        let cols = if storage.block_len() == 256 { 512 } else { 160 };
        for m in [1, 7, 33] {
            let w = weight(storage, 97, cols, 3);
            let x = var((m, cols), 5);
            let plain = f64s(&x).matmul(&f64s(&dense(&w)).t().unwrap()).unwrap();
            agree(&frozen_linear(&x, &w).unwrap(), &plain, &[&x], 3e-6, storage.name());
            agree(&composed::frozen_linear(&x, &w.on(&CPU).unwrap(), None).unwrap(), &plain, &[&x], 3e-6, "composed");
        }
    }
}

#[test]
fn low_rank_linear_with_its_three_gradients() {
    for (storage, m, n, k, r, scale) in
        [(Stored::F32, 5, 50, 48, 3, 0.7f32), (Stored::Q4_1, 33, 200, 96, 8, 2.5), (Stored::Q6K, 2, 19, 256, 17, 0.1)]
    {
        let w = weight(storage, n, k, 1);
        let (x, a, b) = (var((m, k), 2), var((r, k), 3), var((n, r), 4));
        let u = f64s(&x).matmul(&f64s(&a).t().unwrap()).unwrap();
        let change = (u.matmul(&f64s(&b).t().unwrap()).unwrap() * f64::from(scale)).unwrap();
        let plain = (f64s(&x).matmul(&f64s(&dense(&w)).t().unwrap()).unwrap() + &change).unwrap();
        agree(&low_rank_linear(&x, &w, &a, &b, scale).unwrap(), &plain, &[&x, &a, &b], 3e-6, "low rank");
        agree(&low_rank_delta(&x, &a, &b, scale).unwrap(), &change, &[&x, &a, &b], 3e-6, "change alone");
        agree(&composed::low_rank_delta(&x, &a, &b, scale).unwrap(), &change, &[&x, &a, &b], 3e-6, "composed");
    }
}

#[test]
fn rms_norm_over_rows_and_heads() {
    for (m, width, n) in [(7, 40, 40), (5, 48, 12)] {
        let (x, w) = (var((m, width), 6), numbers(n, 7));
        let groups = f64s(&x).reshape((m * width / n, n)).unwrap();
        let mean = (groups.sqr().unwrap().mean_keepdim(D::Minus1).unwrap() + 1e-5).unwrap();
        let weight = Tensor::new(w.clone(), &CPU).unwrap();
        let plain = groups.broadcast_div(&mean.sqrt().unwrap()).unwrap().broadcast_mul(&f64s(&weight)).unwrap();
        let plain = plain.reshape((m, width)).unwrap();
        agree(&rms_norm(&x, &Arc::new(w), 1e-5).unwrap(), &plain, &[&x], 1e-5, "rms norm");
        agree(&composed::rms_norm(&x, &weight, 1e-5).unwrap(), &plain, &[&x], 1e-5, "composed");
    }
}

#[test]
fn swiglu_of_large_and_small_gates() {
    let gate = Var::from_tensor(&(var((9, 31), 8).as_tensor() * 20.0).unwrap()).unwrap();
    let up = var((9, 31), 9);
    let plain = (f64s(&gate).silu().unwrap() * f64s(&up)).unwrap();
    agree(&gated(Activation::Silu, &gate, &up).unwrap(), &plain, &[&gate, &up], 1e-5, "swiglu");
    agree(&composed::gated(Activation::Silu, &gate, &up).unwrap(), &plain, &[&gate, &up], 1e-5, "composed");
}

/// candle's own `gelu` is the tanh form.
#[test]
fn geglu_of_large_and_small_gates() {
    for size in [0.1, 3.0, 20.0] {
        let gate = Var::from_tensor(&(var((9, 31), 8).as_tensor() * size).unwrap()).unwrap();
        let up = var((9, 31), 9);
        let plain = (f64s(&gate).gelu().unwrap() * f64s(&up)).unwrap();
        agree(&gated(Activation::Gelu, &gate, &up).unwrap(), &plain, &[&gate, &up], 1e-5, "geglu");
        agree(&composed::gated(Activation::Gelu, &gate, &up).unwrap(), &plain, &[&gate, &up], 1e-5, "composed");
    }
}

#[test]
fn rope_turns_halves() {
    let (m, heads, half) = (5, 3, 4);
    let frequencies: Vec<f32> = (0..half).map(|i| 100f32.powf(-(i as f32) / half as f32)).collect();
    let positions: Vec<u32> = vec![0, 1, 2, 9, 10];
    let x = var((m, heads * 2 * half), 10);
    let angles: Vec<f64> =
        positions.iter().flat_map(|p| frequencies.iter().map(move |f| f64::from(*p as f32 * f))).collect();
    let angles = Tensor::from_vec(angles, (m, 1, half), &CPU).unwrap();
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    let parts = f64s(&x).reshape((m, heads, 2 * half)).unwrap();
    let (a, b) = (parts.narrow(2, 0, half).unwrap(), parts.narrow(2, half, half).unwrap());
    let low = (a.broadcast_mul(&cos).unwrap() - b.broadcast_mul(&sin).unwrap()).unwrap();
    let high = (b.broadcast_mul(&cos).unwrap() + a.broadcast_mul(&sin).unwrap()).unwrap();
    let plain = Tensor::cat(&[low, high], 2).unwrap().reshape((m, heads * 2 * half)).unwrap();
    let rows = positions.iter().map(|p| (*p as usize, frequencies.as_slice()));
    let rotation = Arc::new(Rotation::new(2 * half, 1.0, rows));
    agree(&rope(&x, &rotation).unwrap(), &plain, &[&x], 1e-5, "rope");
    let [cos, sin] = rotation.on(&CPU).unwrap();
    agree(&composed::rope(&x, [&cos, &sin], 2 * half).unwrap(), &plain, &[&x], 1e-5, "composed");
}

fn shape(window: Option<usize>) -> Attention {
    Attention { heads: 6, kv_heads: 2, head_dim: 8, window, scale: 0.3, compute: Compute::F32 }
}

/// Uneven sequences, one longer than a block, with and without prefixes; the second begins as the fourth and the fifth.
fn branched() -> Vec<Span> {
    let start = |queries, keys| Span { queries, start: 5..49, keys, prefix: 3 };
    spans().into_iter().chain([start(47..58, 57..68), start(58..98, 68..108)]).collect()
}

/// The same without those that share a start.
fn spans() -> Vec<Span> {
    vec![
        Span { queries: 0..5, start: 0..0, keys: 0..5, prefix: 0 },
        Span { queries: 5..46, start: 0..0, keys: 5..49, prefix: 3 },
        Span { queries: 46..47, start: 0..0, keys: 49..57, prefix: 2 },
    ]
}

#[test]
fn attention_with_prefixes_windows_and_blocks() {
    for window in [None, Some(4)] {
        let (q, k, v) = (var((98, 48), 11), var((108, 16), 12), var((108, 16), 13));
        let ones = Tensor::ones((98, 1), DType::F32, &CPU).unwrap();
        let plain = composed::attention([&q, &k, &v], Some(&ones), &shape(window), &branched()).unwrap();
        let ours = attention(&q, &k, &v, &shape(window), &Arc::new(branched())).unwrap();
        agree(&ours, &plain, &[&q, &k, &v], 1e-5, "attention");
        let composed = composed::attention([&q, &k, &v], None, &shape(window), &branched()).unwrap();
        agree(&composed, &plain, &[&q, &k, &v], 1e-5, "composed");
    }
}

/// bf16 rounds the factors of each product: near the f32 result and its gradients, and not equal to them.
#[test]
fn attention_in_bf16() {
    for (window, head_dim) in [(None, 8), (Some(4), 8), (None, 37)] {
        let half = Attention { head_dim, compute: Compute::Bf16, ..shape(window) };
        let shapes = [(98, 6 * head_dim), (108, 2 * head_dim), (108, 2 * head_dim)];
        let [q, k, v] = [0, 1, 2].map(|i| var(shapes[i], 11 + i as u32));
        let ones = Tensor::ones((98, 1), DType::F32, &CPU).unwrap();
        let plain = composed::attention([&q, &k, &v], Some(&ones), &half, &branched()).unwrap();
        let ours = attention(&q, &k, &v, &half, &Arc::new(branched())).unwrap();
        agree(&ours, &plain, &[&q, &k, &v], 1e-2, "attention in bf16");
        let exact = attention(&q, &k, &v, &Attention { compute: Compute::F32, ..half }, &Arc::new(branched())).unwrap();
        let differs = ours.to_vec2::<f32>().unwrap() != exact.to_vec2::<f32>().unwrap();
        assert_eq!(differs, crate::model::kernels::bf16::is_native());
    }
}

/// Against a mask that is held, over more than one task's numbers.
#[test]
fn dropout_draws_its_mask_twice() {
    let x = var((67, 96), 21);
    let stream = crate::domain::rng::Stream::new(5, 9);
    let mask: Vec<f64> = stream.uniforms(67 * 96).map(|u| if u < 0.3 { 0.0 } else { 1.0 / 0.7 }).collect();
    let plain = (f64s(&x) * Tensor::from_vec(mask, (67, 96), &CPU).unwrap()).unwrap();
    agree(&dropout(&x, 0.3, stream).unwrap(), &plain, &[&x], 1e-6, "dropout");
}

/// A known answer for the plain path itself: equal scores average the visible values.
#[test]
fn attention_averages_what_it_sees() {
    let q = Tensor::zeros((3, 48), DType::F32, &CPU).unwrap();
    let (k, v) = (var((3, 16), 14), var((3, 16), 15));
    let spans = vec![Span { queries: 0..3, start: 0..0, keys: 0..3, prefix: 0 }];
    let y = attention(&q, &k, &v, &shape(Some(2)), &Arc::new(spans)).unwrap();
    let y: Vec<Vec<f32>> = y.to_vec2().unwrap();
    let v: Vec<Vec<f32>> = v.to_vec2().unwrap();
    assert!((y[0][0] - v[0][0]).abs() < 1e-6);
    assert!((y[2][47] - (v[1][15] + v[2][15]) / 2.0).abs() < 1e-6);
}

#[test]
fn cached_attention_is_the_same_bits() {
    let (q, k, v) = (var((47, 48), 16), var((57, 16), 17), var((57, 16), 18));
    let whole = attention(&q, &k, &v, &shape(None), &Arc::new(spans())).unwrap();
    let rows = |x: &Tensor, span: &Span| -> Vec<f32> {
        x.narrow(0, span.keys.start, span.keys.len()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    // In a cache a prefix has a block of its own, and text has pages.
    let numbers: Vec<_> = spans().iter().map(|s| (rows(&k, s), rows(&v, s), s.prefix)).collect();
    let blocks: Vec<Vec<Block>> = (numbers.iter())
        .map(|(k, v, prefix)| {
            let (at, text) = (prefix * 16, |x: &Vec<f32>| x.len());
            let prefix = Block { k: &k[..at], v: &v[..at], rows: *prefix };
            let pages = k[at..text(k)].chunks(PAGE * 16).zip(v[at..text(v)].chunks(PAGE * 16));
            let pages = pages.map(|(k, v)| Block { k, v, rows: k.len() / 16 });
            [prefix].into_iter().filter(|block| block.rows > 0).chain(pages).collect()
        })
        .collect();
    let local: Vec<Span> = spans().into_iter().map(|s| Span { keys: 0..s.keys.len(), ..s }).collect();
    let cached = attend_cached(&q, &shape(None), &local, &blocks, None).unwrap();
    assert_eq!(whole.to_vec2::<f32>().unwrap(), cached.to_vec2::<f32>().unwrap());
}

#[test]
fn cross_entropy_in_chunks() {
    let w = weight(Stored::Q8_0, 301, 32, 19);
    let hidden = var((650, 32), 20);
    assert!(scored_rows(301) < 640);
    let targets: Vec<Target> = (0..640)
        .map(|i| Target { row: i + 3, token: (i * 7 % 301) as u32, weight: if i % 5 == 0 { 0.5 } else { 1.0 } })
        .chain([Target { row: 9, token: 4, weight: 2.0 }])
        .collect();
    let scores = f64s(&hidden).matmul(&f64s(&dense(&w)).t().unwrap()).unwrap().to_dtype(DType::F32).unwrap();
    let (plain, expected) = dense_cross_entropy(&scores, &targets).unwrap();
    let (ours, correct) = cross_entropy(&hidden, &w, &targets).unwrap();
    assert_eq!(correct, expected);
    close(&ours, &plain, 1e-6, "loss");
    let (a, b) = (ours.backward().unwrap(), plain.backward().unwrap());
    close(a.get(&hidden).unwrap(), b.get(&hidden).unwrap(), 1e-5, "gradient");
    // Without a gradient to carry, none is made.
    assert!(cross_entropy(&hidden.detach(), &w, &targets).is_ok());
}

/// More targets than a chunk, two of one row, and every token with a weight of its own in the backward pass.
#[test]
fn log_probs_in_chunks() {
    let w = weight(Stored::Q8_0, 301, 32, 21);
    let hidden = var((650, 32), 22);
    let target = |i: usize| Target { row: i + 3, token: (i * 7 % 301) as u32, weight: 1.0 };
    let targets: Vec<Target> = (0..640).map(target).chain([Target { row: 9, token: 4, weight: 3.0 }]).collect();
    let scores = f64s(&hidden).matmul(&f64s(&dense(&w)).t().unwrap()).unwrap().to_dtype(DType::F32).unwrap();
    let (plain, expected) = dense_log_probs(&scores, &targets).unwrap();
    let (ours, correct) = log_probs(&hidden, &w, &targets).unwrap();
    assert_eq!(correct, expected);
    agree(&ours, &plain, &[&hidden], 1e-5, "log-probs");
}
