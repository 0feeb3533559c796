//! Against bitsandbytes: `tests/fixtures/nf4/make.py` says how the numbers were made.

use std::collections::HashMap;

use candle_core::{Device, Tensor};

use super::*;
use crate::model::{
    kernels::Mat,
    weight::{Compute, Weight},
};

const MATRICES: [&str; 5] = ["uneven", "odd", "zeros", "middles", "whole"];

fn fixture() -> HashMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/nf4/bitsandbytes.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn codes_and_scales_are_bitsandbytes_to_the_bit() {
    let fixture = fixture();
    for name in MATRICES {
        let found = quantize(&floats(&fixture[&format!("{name}.values")]));
        assert_eq!(found.codes, bytes(&fixture[&format!("{name}.codes")]), "{name}");
        assert_eq!(found.absmax, floats(&fixture[&format!("{name}.absmax")]), "{name}");
    }
}

/// The offset is a mean, and torch's order of summing is the machine's: it is given here, and near ours.
#[test]
fn scales_of_scales_are_bitsandbytes_to_the_bit() {
    let fixture = fixture();
    for name in MATRICES {
        let nested = |what: &str| &fixture[&format!("{name}.nested.{what}")];
        assert_eq!(dynamic_codes().as_slice(), floats(nested("map")));
        let (absmax, offset) = (floats(&fixture[&format!("{name}.absmax")]), floats(nested("offset"))[0]);
        let (codes, found) = quantize_scales(&absmax, offset);
        assert_eq!(codes, bytes(nested("codes")), "{name}");
        assert_eq!(found.scales, floats(nested("scales")), "{name}");
        let row = Quantized { codes: bytes(&fixture[&format!("{name}.codes")]), absmax };
        let ours = blocks(Storage::NF4DQ, &[row]).1.unwrap();
        assert!((ours.offset - offset).abs() <= 2e-7 * offset.abs(), "{name}: {} {offset}", ours.offset);
    }
}

/// Through a weight, whole and in parts, on every instruction set that dispatches here.
#[test]
fn a_weight_in_nf4_gives_bitsandbytes_numbers() {
    let fixture = fixture();
    let values = &fixture["whole.values"];
    let (rows, cols) = values.dims2().unwrap();
    let raw: Vec<u8> = floats(values).iter().flat_map(|x| x.to_le_bytes()).collect();
    let dense = Weight::new(Storage::F32, rows, cols, raw.into());
    for (storage, expected, bits) in [(Storage::NF4, "dequantized", 4.5), (Storage::NF4DQ, "nested.dequantized", 4.2)] {
        let weight = dense.to_nf4(storage).unwrap();
        assert!(8.0 * weight.bytes() as f64 / (rows * cols) as f64 <= bits, "{}", weight.bytes());
        let mut found = vec![0.0; rows * cols];
        weight.dequantize_rows(0, rows, &mut found);
        for (a, b) in found.iter().zip(floats(&fixture[expected])) {
            assert!((a - b).abs() <= 2e-7 * b.abs(), "{}: {a} {b}", storage.name());
        }
        let mut row = vec![0.0; 3 * cols];
        weight.dequantize_rows(120, 3, &mut row);
        assert_eq!(row, found[120 * cols..123 * cols]);
    }
    let uneven = Weight::new(Storage::F32, 1, 100, vec![0; 400].into());
    assert!(uneven.to_nf4(Storage::NF4).is_none());
}

/// What serving multiplies: rows and levels rounded to int8, the scales of scales looked up.
#[test]
fn the_fast_product_is_near_the_exact_one() {
    let values = &fixture()["whole.values"];
    let (rows, cols) = values.dims2().unwrap();
    let raw: Vec<u8> = floats(values).iter().flat_map(|x| x.to_le_bytes()).collect();
    let dense = Weight::new(Storage::F32, rows, cols, raw.into());
    let x: Vec<f32> = crate::domain::rng::Stream::new(3, 1).normals(7 * cols).collect();
    let product = |weight: &Weight, x: &[f32]| weight.product(Mat::new(x, x.len() / cols, cols));
    for storage in [Storage::NF4, Storage::NF4DQ] {
        let weight = dense.to_nf4(storage).unwrap();
        let fast = weight.computing(Compute::Int8);
        assert_eq!(fast.compute(), Compute::Int8);
        let (exact, found) = (product(&weight, &x), product(&fast, &x));
        let square = |sum: f64, x: f32| sum + f64::from(x) * f64::from(x);
        let error = exact.iter().zip(&found).map(|(a, b)| a - b).fold(0.0, square);
        let size = exact.iter().copied().fold(0.0, square);
        assert!(error.sqrt() < 0.01 * size.sqrt(), "{}: {error} of {size}", storage.name());
        for (x, y) in x.chunks(cols).zip(found.chunks(rows)) {
            assert_eq!(product(&fast, x), y, "a row depends on its batch");
        }
    }
}
