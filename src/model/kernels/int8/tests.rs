use super::{
    super::{Mat, OutMat, tests::random},
    *,
};
use crate::model::quant::{dequantize, tests::blocks};

const STORED: [Storage; 9] = [
    Storage::Q4_0,
    Storage::Q4_1,
    Storage::Q5_0,
    Storage::Q5_1,
    Storage::Q8_0,
    Storage::Q4K,
    Storage::Q5K,
    Storage::Q6K,
    Storage::NF4,
];

/// The numbers that the codes of a storage stand for here.
fn numbers(storage: Storage, bytes: &[u8], out: &mut [f32]) {
    dequantize(storage, bytes, out);
    if storage == Storage::NF4 {
        for (block, out) in bytes.chunks(36).zip(out.chunks_mut(64)) {
            let largest = f32::from_le_bytes(block[..4].try_into().unwrap());
            out.iter_mut().for_each(|w| *w = (*w / largest * 112.0).round() / 112.0 * largest);
        }
    }
}

/// Weights of `n` rows; `k` is a few blocks.
fn weights(storage: Storage, n: usize) -> (Vec<u8>, usize) {
    let k = match storage.block_len() {
        32 => 224,
        64 => 192,
        _ => 512,
    };
    (blocks(storage, n * k / storage.block_len()), k)
}

fn product(isa: Isa, x: &Rows, storage: Storage, bytes: &[u8], n: usize) -> Vec<f32> {
    let mut panel = Panel::default();
    // What an earlier, larger call left there must not matter.
    panel.fill_with(isa, Storage::Q8_0, &blocks(Storage::Q8_0, 16 * 20), 16, 640);
    panel.fill_with(isa, storage, bytes, n, x.cols);
    let mut out = vec![f32::NAN; x.rows * n];
    nt_with(isa, x, &panel, &mut OutMat::of(&mut out, x.rows, n));
    out
}

/// Against f64 over the dequantised weights and the rounded rows: only the last roundings differ.
#[test]
fn every_path_multiplies_what_is_stored() {
    for storage in STORED {
        for (m, n) in [(1, 16), (3, 5), (9, 16), (14, 11), (37, 13)] {
            let (bytes, k) = weights(storage, n);
            let mut w = vec![0.0; n * k];
            numbers(storage, &bytes, &mut w);
            let x = Rows::round(Mat::strided(&random(m * (k + 3), 5)[3..], m, k, k + 3), block_len(storage).unwrap());
            for isa in Isa::available() {
                let out = product(isa, &x, storage, &bytes, n);
                for i in 0..m {
                    let (codes, scales, _) = x.row(i);
                    for j in 0..n {
                        let terms =
                            |p: usize| f64::from(codes[p]) * f64::from(scales[p / x.block]) * f64::from(w[j * k + p]);
                        let (sum, size) = (0..k).map(terms).fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                        let found = f64::from(out[i * n + j]);
                        // A minimum of −128 scales is taken away again: the parts are larger than the terms.
                        let bound = 1e-6 * (size + 40.0);
                        assert!((found - sum).abs() < bound, "{isa:?} {} ({i}, {j}): {found}, {sum}", storage.name());
                    }
                }
            }
        }
    }
}

/// The largest codes beside the largest numbers, with and without their sign: sums in few bits hold them.
#[test]
fn the_largest_codes_have_room() {
    for storage in STORED {
        let codes = match storage {
            Storage::Q4_0 | Storage::Q5_0 | Storage::Q8_0 => 2..storage.block_bytes(),
            Storage::Q4_1 | Storage::Q5_1 | Storage::NF4 => 4..storage.block_bytes(),
            Storage::Q4K | Storage::Q5K => 16..storage.block_bytes(),
            _ => 0..192,
        };
        for (code, sign) in [(0xFFu8, 1.0f32), (0xFF, -1.0), (0x80, 1.0), (0x7F, -1.0), (0, 1.0)] {
            let (mut bytes, k) = weights(storage, 16);
            bytes.chunks_mut(storage.block_bytes()).for_each(|block| block[codes.clone()].fill(code));
            let mut w = vec![0.0; 16 * k];
            numbers(storage, &bytes, &mut w);
            let x = Rows::round(Mat::new(&vec![sign; 5 * k], 5, k), block_len(storage).unwrap());
            for isa in Isa::available() {
                let out = product(isa, &x, storage, &bytes, 16);
                for (found, w) in out.iter().zip(w.chunks(k).cycle()) {
                    let sum: f64 = w.iter().map(|w| f64::from(*w) * f64::from(sign)).sum();
                    let size: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
                    let is_near = (f64::from(*found) - sum).abs() < 1e-5 * (size + 1.0);
                    assert!(is_near, "{isa:?} {} {code:#x}: {found}, {sum}", storage.name());
                }
            }
        }
    }
}

/// What rounding NF4's levels can add to the product of a row with the weights' row `j`; the rows themselves are
/// rounded before, by half a step.
fn levels(row: &[f32], bytes: &[u8], j: usize) -> f64 {
    let blocks = bytes.chunks(36).skip(j * row.len() / 64);
    let size = |row: &[f32]| row.iter().map(|x| f64::from(x.abs())).sum::<f64>() * 1.2;
    let largest = |block: &[u8]| f64::from(f32::from_le_bytes(block[..4].try_into().unwrap()));
    row.chunks(64).zip(blocks).map(|(row, block)| 0.0039 * largest(block) * size(row)).sum()
}

/// Half a step of each number, as rounding to int8 promises.
#[test]
fn the_rounding_costs_at_most_half_a_step() {
    for (storage, m, n) in STORED.iter().flat_map(|s| [(*s, 1, 16), (*s, 6, 13)]) {
        let (bytes, k) = weights(storage, n);
        let mut w = vec![0.0; n * k];
        dequantize(storage, &bytes, &mut w);
        let data = random(m * k, 6);
        let block = block_len(storage).unwrap();
        let x = Rows::round(Mat::new(&data, m, k), block);
        for isa in Isa::available() {
            let out = product(isa, &x, storage, &bytes, n);
            for (i, row) in data.chunks(k).enumerate() {
                for (j, w) in w.chunks(k).enumerate() {
                    let exact: f64 = row.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    let step = |row: &[f32]| f64::from(row.iter().fold(0f32, |m, x| m.max(x.abs()))) / 127.0;
                    let weight = |w: &[f32]| w.iter().map(|w| f64::from(w.abs())).sum::<f64>();
                    let blocks = row.chunks(block).zip(w.chunks(block));
                    let bound: f64 = blocks.map(|(row, w)| 0.5 * step(row) * weight(w)).sum::<f64>() + 1e-4;
                    // NF4's levels are rounded too, by at most 0.0039 of a block's largest.
                    let bound = bound + if storage == Storage::NF4 { levels(row, &bytes, j) } else { 0.0 };
                    let error = (f64::from(out[i * n + j]) - exact).abs();
                    assert!(error < bound, "{isa:?} {}: {error} above {bound}", storage.name());
                }
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_the_batch() {
    for storage in STORED {
        let (m, n) = (43, 16);
        let (bytes, k) = weights(storage, n);
        let data = random(m * k, 7);
        let block = block_len(storage).unwrap();
        let all = Rows::round(Mat::new(&data, m, k), block);
        for isa in Isa::available() {
            let together = product(isa, &all, storage, &bytes, n);
            for (i, row) in data.chunks(k).enumerate() {
                let alone = product(isa, &Rows::round(Mat::new(row, 1, k), block), storage, &bytes, n);
                assert_eq!(alone, together[i * n..][..n], "{isa:?} {}", storage.name());
            }
        }
    }
}

#[test]
fn rounding_keeps_zeros_signs_and_what_is_no_number() {
    let mut data = vec![0f32; 96];
    (data[32], data[33], data[34]) = (-2.54, 1.27, 0.01);
    let x = Rows::round(Mat::new(&data, 1, 96), 32);
    assert_eq!((&x.codes[..3], &x.codes[32..35], x.scales[0]), (&[0i8; 3][..], &[-127i8, 64, 0][..], 0.0));
    assert!((x.sums[1] - x.scales[1] * -63.0).abs() < 1e-6);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        data[70] = bad;
        let x = Rows::round(Mat::new(&data, 1, 96), 32);
        assert!(x.scales[2].is_nan() && x.scales[1].is_finite(), "{bad}");
    }
}
