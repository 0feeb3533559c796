//! Numbers in 8 bits: each block of 256 is scaled by its largest magnitude and coded by the nearest value of a fixed
//! map whose steps grow with the magnitude (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
//! arXiv 2110.02861; bitsandbytes' `create_dynamic_map`).

use std::sync::LazyLock;

use rayon::{iter::IndexedParallelIterator, slice::ParallelSliceMut};

/// Numbers that share a scale.
pub const BLOCK: usize = 256;

/// A code for each number and a scale for each block.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
}

impl Codes {
    pub fn zero(n: usize, map: &Map) -> Self {
        Self { codes: vec![map.nearest(0.0); n], scales: vec![0.0; n.div_ceil(BLOCK)] }
    }

    /// Codes and scales of `n` numbers at a time, a multiple of [`BLOCK`].
    pub fn chunks_mut(&mut self, n: usize) -> impl IndexedParallelIterator<Item = (&mut [u8], &mut [f32])> {
        self.codes.par_chunks_mut(n).zip(self.scales.par_chunks_mut(n / BLOCK))
    }
}

/// The 256 values that codes stand for, ascending, in [-1, 1] or [0, 1].
pub struct Map {
    values: [f32; 256],
    /// Halfway between neighbours.
    bounds: [f32; 255],
}

impl Map {
    pub fn signed() -> &'static Self {
        static MAP: LazyLock<Map> = LazyLock::new(|| Map::new(true));
        &MAP
    }

    pub fn unsigned() -> &'static Self {
        static MAP: LazyLock<Map> = LazyLock::new(|| Map::new(false));
        &MAP
    }

    /// Seven decades below 1, each of twice as many steps as the one below; a sign costs half the steps.
    fn new(is_signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for decade in 0..7 {
            let steps = 1usize << if is_signed { decade } else { decade + 1 };
            let scale = 10f64.powi(decade - 6);
            let boundary = |i: usize| (0.1 + 0.9 * i as f64 / steps as f64) as f32;
            for i in 0..steps {
                let value = (scale * f64::from((boundary(i) + boundary(i + 1)) / 2.0)) as f32;
                values.push(value);
                if is_signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        let values: [f32; 256] = std::array::from_fn(|i| values[i]);
        Self { values, bounds: std::array::from_fn(|i| (values[i] + values[i + 1]) / 2.0) }
    }

    fn nearest(&self, value: f32) -> u8 {
        self.bounds.partition_point(|bound| *bound < value) as u8
    }
}

pub fn dequantise(map: &Map, codes: &[u8], scale: f32, values: &mut [f32]) {
    codes.iter().zip(values).for_each(|(code, value)| *value = map.values[usize::from(*code)] * scale);
}

/// Codes one block; gives its scale.
pub fn quantise(map: &Map, values: &[f32], codes: &mut [u8]) -> f32 {
    let scale = values.iter().fold(0f32, |most, value| most.max(value.abs()));
    let divisor = if scale > 0.0 { scale } else { 1.0 };
    codes.iter_mut().zip(values).for_each(|(code, value)| *code = map.nearest(value / divisor));
    scale
}
