//! A frozen matrix, stored as in the file, and its two products.

use std::{
    cell::RefCell,
    ops::Range,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use candle_core::{DType, Device, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::{
    kernels::{
        self, Mat, Out,
        bf16::{self as half_products, LINE, Line, interleave, narrow},
        int8::{self, Panel},
    },
    nf4::{self, Nested},
    quant::dequantize,
    turns::in_parts,
};
use crate::formats::Storage;

/// What the factors of a product are rounded to; sums are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compute {
    F32,
    Bf16,
    /// Forward only: rows rounded to int8 beside weights stored in blocks of codes, exact integer sums inside a block
    /// (`kernels::int8`). Other storages are multiplied as `auto` says.
    Int8,
}

impl Compute {
    /// The most precise of the fast ways: bf16 where the kernels have it, but f32 for weights stored in f32.
    pub fn auto(storage: Storage) -> Self {
        if storage != Storage::F32 && kernels::bf16::is_native() { Self::Bf16 } else { Self::F32 }
    }
}

/// `[rows, cols]` = `[out, in]`; the bytes are a view into the mapped file, or our own where rows had to move or the
/// matrix was quantised at load.
/// Cloning is cheap.
#[derive(Clone)]
pub struct Weight {
    pub storage: Storage,
    pub rows: usize,
    pub cols: usize,
    /// Added to each row of the product.
    pub bias: Option<Arc<[f32]>>,
    compute: Compute,
    bytes: Bytes,
    /// What scales the blocks' scales, in NF4-DQ.
    nested: Option<Arc<Nested>>,
    /// The squared length of each row, once somebody asked; shared by all clones.
    squares: Arc<OnceLock<Arc<[f64]>>>,
    /// The numbers on another device than the CPU, in f32 and in bf16, once somebody asked; shared by all clones.
    placed: Arc<[OnceLock<Tensor>; 2]>,
}

/// Numbers of dequantised weights that one task holds: fits the second-level cache beside the activations, and leaves
/// tasks enough of a small matrix to share.
const TILE: usize = 28 * 1024;

/// Columns that one task of the backward takes; K-quants have blocks of 256.
const WIDTH: usize = 96;

/// Rows that are unpacked before they are rounded: what lies between stays in the first-level cache.
const UNPACKED: usize = 8;

struct Scratch {
    wide: Vec<f32>,
    narrow: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { wide: Vec::new(), narrow: Vec::new() }) };
    static PANEL: RefCell<Panel> = RefCell::default();
}

/// A buffer's first `n`, grown when needed.
fn first<T: Clone + Default>(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
    if buffer.len() < n {
        buffer.resize(n, T::default());
    }
    &mut buffer[..n]
}

/// The first `n` numbers of a buffer of lines.
fn first_numbers(buffer: &mut Vec<Line>, n: usize) -> &mut [bf16] {
    let lines = n.div_ceil(LINE);
    if buffer.len() < lines {
        buffer.resize(lines, Line::ZERO);
    }
    &mut half_products::numbers_mut(&mut buffer[..lines])[..n]
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
        Self {
            storage,
            rows,
            cols,
            bias: None,
            compute: Compute::F32,
            bytes,
            nested: None,
            squares: Arc::default(),
            placed: Arc::default(),
        }
    }

    /// A dense matrix in NF4, with its scales as they are or quantised too. None where rows are not whole blocks:
    /// bitsandbytes lets a block run over the end of a row, and our rows stand for themselves.
    pub fn to_nf4(&self, storage: Storage) -> Option<Self> {
        if !self.cols.is_multiple_of(nf4::BLOCK) {
            return None;
        }
        let row = |row: usize| {
            let mut numbers = vec![0.0; self.cols];
            self.dequantize_rows(row, 1, &mut numbers);
            nf4::quantize(&numbers)
        };
        let rows: Vec<nf4::Quantized> = (0..self.rows).into_par_iter().map(row).collect();
        let (bytes, nested) = nf4::blocks(storage, &rows);
        let nested = nested.map(Arc::new);
        let (bytes, bias) = (bytes.into(), self.bias.clone());
        Some(Self { storage, bytes, nested, bias, squares: Arc::default(), placed: Arc::default(), ..*self })
    }

    /// The same in memory of its own, so that the file need not stay mapped.
    pub fn to_owned_bytes(&self) -> Self {
        Self { bytes: Bytes::copy_from_slice(&self.bytes), ..self.clone() }
    }

    /// Memory that the numbers take.
    pub fn bytes(&self) -> usize {
        self.bytes.len() + self.nested.as_ref().map_or(0, |nested| nested.bytes())
    }

    /// The stored bytes of some rows.
    pub fn row_bytes(&self, row: usize, count: usize) -> &[u8] {
        let stride = self.row_blocks() * self.storage.block_bytes();
        &self.bytes[row * stride..(row + count) * stride]
    }

    /// Some rows as a matrix of their own, over the same bytes.
    pub fn rows(&self, row: usize, count: usize) -> Self {
        let bytes = self.bytes.slice_ref(self.row_bytes(row, count));
        Self { rows: count, bytes, squares: Arc::default(), placed: Arc::default(), ..self.clone() }
    }

    /// Rows as numbers; `out` is `(count, cols)`.
    pub fn dequantize_rows(&self, row: usize, count: usize, out: &mut [f32]) {
        self.dequantize_blocks(row * self.row_blocks(), self.row_bytes(row, count), out);
    }

    fn row_blocks(&self) -> usize {
        self.cols / self.storage.block_len()
    }

    /// `first` is the place of the first of these blocks in the matrix.
    fn dequantize_blocks(&self, first: usize, blocks: &[u8], out: &mut [f32]) {
        match &self.nested {
            None => dequantize(self.storage, blocks, out),
            Some(nested) => nf4::dequantize_nested(nested, first, blocks, out),
        }
    }

    /// `‖W_o‖²` of each row.
    pub fn row_squares(&self) -> Arc<[f64]> {
        let square = |row: usize| {
            SCRATCH.with_borrow_mut(|scratch| {
                let numbers = first(&mut scratch.wide, self.cols);
                self.dequantize_rows(row, 1, numbers);
                numbers.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()
            })
        };
        self.squares.get_or_init(|| (0..self.rows).into_par_iter().map(square).collect::<Vec<_>>().into()).clone()
    }

    /// Columns `col..col + width` of some rows, whole blocks; `out` is `(count, width)`.
    fn dequantize_part(&self, row: usize, count: usize, col: usize, width: usize, out: &mut [f32]) {
        let (len, size) = (self.storage.block_len(), self.storage.block_bytes());
        for (r, out) in out.chunks_mut(width).enumerate().take(count) {
            let blocks = &self.row_bytes(row + r, 1)[col / len * size..(col + width) / len * size];
            self.dequantize_blocks((row + r) * self.row_blocks() + col / len, blocks, out);
        }
    }

    /// W as a tensor `(rows, cols)` of a device, in the type that products are made in. Made once and kept there.
    pub fn on(&self, device: &Device) -> Result<Tensor> {
        let (place, dtype) = match self.compute {
            Compute::F32 => (0, DType::F32),
            Compute::Bf16 | Compute::Int8 => (1, DType::BF16),
        };
        if let Some(tensor) = self.placed[place].get() {
            return Ok(tensor.clone());
        }
        let mut numbers = vec![0.0; self.rows * self.cols];
        self.dequantize_rows(0, self.rows, &mut numbers);
        let tensor =
            Tensor::from_vec(numbers, (self.rows, self.cols), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?;
        Ok(self.placed[place].get_or_init(|| tensor).clone())
    }

    pub fn bias_on(&self, device: &Device) -> Result<Option<Tensor>> {
        self.bias.as_ref().map(|bias| Tensor::new(&bias[..], device)).transpose()
    }

    pub fn compute(&self) -> Compute {
        self.compute
    }

    pub fn computing(&self, compute: Compute) -> Self {
        let compute = match (compute, int8::block_len(self.storage)) {
            (Compute::Int8, None) => Compute::auto(self.storage),
            _ => compute,
        };
        Self { compute, ..self.clone() }
    }

    /// Whether two matrices are the same bytes.
    pub fn is_same(&self, other: &Self) -> bool {
        self.bytes.as_ptr() == other.bytes.as_ptr()
    }

    /// `x Wᵀ (+ b)`: `x` is `(m, in)`, the result `(m, out)`.
    pub fn product(&self, x: Mat) -> Vec<f32> {
        // SAFETY: a product writes all rows and columns.
        let mut y = unsafe { kernels::filled(x.rows * self.rows, |y| self.write(x, Out::fresh(y, self.rows))) };
        if let Some(bias) = &self.bias {
            for row in y.chunks_mut(self.rows) {
                row.iter_mut().zip(bias.iter()).for_each(|(y, b)| *y += b);
            }
        }
        y
    }

    fn write(&self, x: Mat, y: Out) {
        assert!(x.cols == self.cols, "shapes differ");
        match int8::block_len(self.storage).filter(|_| self.compute == Compute::Int8) {
            Some(block) => self.forward_int8(x, block, y),
            None => self.forward_tiles(x, y),
        }
    }

    /// Sixteen rows of W a task, unpacked once for all of x.
    fn forward_int8(&self, x: Mat, block: usize, out: Out) {
        let x = int8::Rows::round(x, block);
        (0..self.rows.div_ceil(Panel::ROWS)).into_par_iter().for_each(|t| {
            let row = t * Panel::ROWS;
            let count = Panel::ROWS.min(self.rows - row);
            PANEL.with_borrow_mut(|panel| {
                let bytes = self.row_bytes(row, count);
                panel.fill(self.storage, bytes, count, self.cols);
                if let Some(nested) = &self.nested {
                    let (per_row, size) = (self.row_blocks(), self.storage.block_bytes());
                    panel.set_largest(|i, block| {
                        let place = i * per_row + block;
                        nested.largest(row * per_row + place, bytes[place * size])
                    });
                }
                // What this thread unpacks next comes from memory meanwhile.
                let next = (row + count).min(self.rows);
                kernels::prefetch(self.row_bytes(next, Panel::ROWS.min(self.rows - next)));
                // SAFETY: tasks write different columns, and the caller keeps the buffer.
                let mut part = unsafe { out.part(row, x.rows(), count) };
                int8::nt(&x, panel, &mut part);
            });
        });
    }

    /// A few rows of W a task, as numbers.
    fn forward_tiles(&self, x: Mat, out: Out) {
        let narrowed = self.narrowed(x);
        let full = if narrowed.is_some() { half_products::full_rows() } else { 4 };
        let tile = (TILE / self.cols).clamp(full, 96) / full * full;
        let one = |t: usize| {
            let row = t * tile;
            let count = tile.min(self.rows - row);
            SCRATCH.with_borrow_mut(|scratch| {
                // SAFETY: tasks write different columns, and the caller keeps the buffer.
                let mut part = unsafe { out.part(row, x.rows, count) };
                match &narrowed {
                    None => {
                        let w = first(&mut scratch.wide, count * self.cols);
                        self.dequantize_rows(row, count, w);
                        kernels::nt(x, Mat::new(w, count, self.cols), &mut part, false);
                    }
                    Some(x) => {
                        let w = first_numbers(&mut scratch.narrow, count * self.cols);
                        for (i, w) in w.chunks_mut(UNPACKED * self.cols).enumerate() {
                            let wide = first(&mut scratch.wide, w.len());
                            self.dequantize_rows(row + UNPACKED * i, w.len() / self.cols, wide);
                            narrow(wide, w);
                        }
                        half_products::nt(x, Mat::new(w, count, self.cols), &mut part, false);
                    }
                }
            });
        };
        in_parts(self.rows.div_ceil(tile), x.rows * self.cols * tile, |tiles| tiles.into_par_iter().for_each(one));
    }

    /// The left side of a product in bf16, if that is what is computed.
    fn narrowed(&self, x: Mat) -> Option<half_products::Rows> {
        (self.compute == Compute::Bf16).then(|| half_products::Rows::narrow(x))
    }

    /// `g W`: `g` is `(m, out)`, the result `(m, in)`.
    pub fn product_back(&self, g: Mat) -> Vec<f32> {
        // SAFETY: a product writes all rows and columns.
        unsafe { kernels::filled(g.rows * self.cols, |dx| self.write_back(g, Out::fresh(dx, self.cols))) }
    }

    fn write_back(&self, g: Mat, out: Out) {
        // Of no rows nothing would be written.
        assert!(g.cols == self.rows && self.rows > 0, "shapes differ");
        let narrowed = self.narrowed(g);
        let width = WIDTH.next_multiple_of(self.storage.block_len());
        // Whole steps of every kernel.
        let depth = if narrowed.is_some() { half_products::DEPTH } else { TILE / width / LINE * LINE };
        let one = |t: usize, steps: Range<usize>| {
            let col = t * width;
            let width = width.min(self.cols - col);
            SCRATCH.with_borrow_mut(|scratch| {
                for row in steps.map(|step| step * depth) {
                    let count = depth.min(self.rows - row);
                    // SAFETY: tasks write different columns, and the caller keeps the buffer.
                    let mut part = unsafe { out.part(col, g.rows, width) };
                    let accumulate = row > 0;
                    match &narrowed {
                        None => {
                            let w = first(&mut scratch.wide, count * width);
                            self.dequantize_part(row, count, col, width, w);
                            let left = Mat::strided(&g.data[row..], g.rows, count, g.stride);
                            kernels::nn(left, Mat::new(w, count, width), &mut part, accumulate);
                        }
                        Some(g) => {
                            let pairs = count.div_ceil(2);
                            let w = first_numbers(&mut scratch.narrow, 2 * pairs * width).as_chunks_mut::<2>().0;
                            for (i, pairs) in w.chunks_mut(UNPACKED / 2 * width).enumerate() {
                                let wide = first(&mut scratch.wide, 2 * pairs.len());
                                let first = UNPACKED * i;
                                let count = (count - first).min(UNPACKED);
                                self.dequantize_part(row + first, count, col, width, wide);
                                wide[count * width..].fill(0.0);
                                for (pairs, rows) in pairs.chunks_mut(width).zip(wide.chunks(2 * width)) {
                                    interleave(&rows[..width], &rows[width..], pairs);
                                }
                            }
                            half_products::nn(g, row, Mat::new(w, pairs, width), &mut part, accumulate);
                        }
                    }
                }
            });
        };
        in_parts(self.rows.div_ceil(depth), g.rows * depth * self.cols, |steps| {
            (0..self.cols.div_ceil(width)).into_par_iter().for_each(|t| one(t, steps.clone()));
        });
    }
}
