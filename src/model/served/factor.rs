//! A trained matrix while it is served.
//!
//! A batch of many adapters pays for their bytes, not for their products. So beside int8 products of the base a matrix
//! is kept in int8 too, each row with one scale, rounded once when the adapter is loaded: a row `w` becomes `s·c` with
//! codes c in ±127. The rows of activations stay f32.

use candle_core::{Device, Result, Tensor};

use crate::model::{
    Compute,
    kernels::{self, Mat, OutMat, int8::round_whole},
};

pub enum Factor {
    F32(Vec<f32>),
    Int8 {
        codes: Vec<i8>,
        /// Of each row.
        scales: Vec<f32>,
    },
}

impl Factor {
    /// Of rows one behind another.
    pub fn new(values: Vec<f32>, rows: usize, compute: Compute) -> Self {
        if compute != Compute::Int8 || rows == 0 {
            return Self::F32(values);
        }
        let (mut codes, cols) = (vec![0; values.len()], values.len() / rows);
        let both = values.chunks_exact(cols).zip(codes.chunks_exact_mut(cols));
        let scales = both.map(|(row, codes)| round_whole(row, codes)).collect();
        Self::Int8 { codes, scales }
    }

    /// `out = x · selfᵀ`: `(m, cols) → (m, rows)`.
    pub fn nt(&self, x: Mat, rows: usize, out: &mut OutMat) {
        match self {
            Self::F32(values) => kernels::nt(x, Mat::new(values, rows, x.cols), out, false),
            Self::Int8 { codes, scales } => {
                kernels::nt(x, Mat::new(codes, rows, x.cols), out, false);
                (0..x.rows).for_each(|i| scale(out.row(i), scales));
            }
        }
    }

    /// `out += u · self`: `(m, rows) → (m, cols)`; `u` is used up.
    pub fn add_nn(&self, u: &mut [f32], rows: usize, cols: usize, out: &mut OutMat) {
        let m = u.len() / rows;
        match self {
            Self::F32(values) => kernels::nn(Mat::new(u, m, rows), Mat::new(values, rows, cols), out, true),
            Self::Int8 { codes, scales } => {
                u.chunks_exact_mut(rows).for_each(|u| scale(u, scales));
                kernels::nn(Mat::new(u, m, rows), Mat::new(codes, rows, cols), out, true);
            }
        }
    }

    pub fn tensor(&self, rows: usize, cols: usize, device: &Device) -> Result<Tensor> {
        match self {
            Self::F32(values) => Tensor::from_slice(values, (rows, cols), device),
            Self::Int8 { codes, scales } => {
                let rows_of = codes.chunks_exact(cols).zip(scales);
                let values = rows_of.flat_map(|(row, scale)| row.iter().map(move |code| f32::from(*code) * scale));
                Tensor::from_vec(values.collect(), (rows, cols), device)
            }
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val(values.as_slice()),
            Self::Int8 { codes, scales } => codes.len() + size_of_val(scales.as_slice()),
        }
    }
}

fn scale(row: &mut [f32], scales: &[f32]) {
    row.iter_mut().zip(scales).for_each(|(x, scale)| *x *= scale);
}
