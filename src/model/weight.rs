//! A frozen matrix, stored as in the file, and its two products.

use std::cell::RefCell;

use bytes::Bytes;
use rayon::prelude::*;

use super::{
    kernels::{self, Mat, Out},
    quant::dequantize,
};
use crate::formats::Storage;

/// `[rows, cols]` = `[out, in]`; the bytes are a view into the mapped file, or our own where rows had to move.
pub struct Weight {
    pub storage: Storage,
    pub rows: usize,
    pub cols: usize,
    /// Added to each row of the product.
    pub bias: Option<Vec<f32>>,
    bytes: Bytes,
}

/// Numbers of dequantised weights that one task holds: fits the second-level cache beside the activations.
const TILE: usize = 48 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends this thread's buffer. Not re-entrant: `f` runs no parallel work.
fn with_scratch<R>(n: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|buffer| {
        if buffer.len() < n {
            buffer.resize(n, 0.0);
        }
        f(&mut buffer[..n])
    })
}

impl Weight {
    /// # Panics
    /// If the bytes are not those of the shape; loaders check before.
    pub fn new(storage: Storage, rows: usize, cols: usize, bytes: Bytes) -> Self {
        assert!(cols.is_multiple_of(storage.block_len()), "rows are not whole blocks");
        assert_eq!(
            bytes.len(),
            rows * cols / storage.block_len() * storage.block_bytes(),
            "bytes do not fit the shape"
        );
        Self { storage, rows, cols, bias: None, bytes }
    }

    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The stored bytes of some rows.
    pub fn row_bytes(&self, row: usize, count: usize) -> &[u8] {
        let stride = self.cols / self.storage.block_len() * self.storage.block_bytes();
        &self.bytes[row * stride..(row + count) * stride]
    }

    /// Rows as numbers; `out` is `(count, cols)`.
    pub fn dequantize_rows(&self, row: usize, count: usize, out: &mut [f32]) {
        dequantize(self.storage, self.row_bytes(row, count), out);
    }

    /// Columns `col..col + width` of some rows, whole blocks; `out` is `(count, width)`.
    fn dequantize_part(&self, row: usize, count: usize, col: usize, width: usize, out: &mut [f32]) {
        let (len, size) = (self.storage.block_len(), self.storage.block_bytes());
        for (r, out) in out.chunks_mut(width).enumerate().take(count) {
            let blocks = &self.row_bytes(row + r, 1)[col / len * size..(col + width) / len * size];
            dequantize(self.storage, blocks, out);
        }
    }

    /// `y = x Wᵀ (+ b)`: `x` is `(m, in)`, `y` is `(m, out)`, overwritten.
    pub fn forward(&self, x: Mat, y: &mut [f32]) {
        assert!(x.cols == self.cols && y.len() == x.rows * self.rows, "shapes differ");
        let tile = (TILE / self.cols).clamp(3, 96) / 3 * 3;
        let out = Out::new(y, self.rows);
        (0..self.rows.div_ceil(tile)).into_par_iter().for_each(|t| {
            let row = t * tile;
            let count = tile.min(self.rows - row);
            with_scratch(count * self.cols, |w| {
                self.dequantize_rows(row, count, w);
                // SAFETY: tasks write different columns, and `y` is borrowed until all have ended.
                let mut part = unsafe { out.part(row, x.rows, count) };
                kernels::nt(x, Mat::new(w, count, self.cols), &mut part, false);
            });
        });
        if let Some(bias) = &self.bias {
            for row in y.chunks_mut(self.rows) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
    }

    /// `dx = g W`, or `dx += g W`: `g` is `(m, out)`, `dx` is `(m, in)`.
    pub fn backward(&self, g: Mat, dx: &mut [f32], accumulate: bool) {
        assert!(g.cols == self.rows && dx.len() == g.rows * self.cols, "shapes differ");
        let width = if self.storage.block_len() == 256 { 256 } else { 96 };
        let depth = TILE / width / 2;
        let out = Out::new(dx, self.cols);
        (0..self.cols.div_ceil(width)).into_par_iter().for_each(|t| {
            let col = t * width;
            let width = width.min(self.cols - col);
            with_scratch(depth * width, |w| {
                for row in (0..self.rows).step_by(depth) {
                    let count = depth.min(self.rows - row);
                    self.dequantize_part(row, count, col, width, w);
                    // SAFETY: tasks write different columns, and `dx` is borrowed until all have ended.
                    let mut part = unsafe { out.part(col, g.rows, width) };
                    let left = Mat::strided(&g.data[row..], g.rows, count, g.stride);
                    kernels::nn(left, Mat::new(w, count, width), &mut part, accumulate || row > 0);
                }
            });
        });
    }
}
