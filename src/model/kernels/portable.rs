//! The products in plain Rust; what every other path is checked against.

use super::{Mat, OutMat, Wide};

const LANES: usize = 8;

pub fn nt<T: Wide>(a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    for i in 0..a.rows {
        let x = &a.data[i * a.stride..][..a.cols];
        for j in 0..b.rows {
            let sum = dot(x, &b.data[j * b.stride..][..b.cols]);
            // SAFETY: `i < out.rows` and `j < out.cols`, and the part was checked to be inside its buffer.
            unsafe { put(out, i, j, sum, accumulate) };
        }
    }
}

pub fn nn<T: Wide>(a: Mat, b: Mat<T>, out: &mut OutMat, accumulate: bool) {
    let mut row = vec![0f32; b.cols];
    for i in 0..a.rows {
        row.fill(0.0);
        for p in 0..a.cols {
            let x = a.data[i * a.stride + p * a.step];
            for (sum, y) in row.iter_mut().zip(&b.data[p * b.stride..][..b.cols]) {
                *sum += x * y.number();
            }
        }
        for (j, sum) in row.iter().enumerate() {
            // SAFETY: as in `nt`.
            unsafe { put(out, i, j, *sum, accumulate) };
        }
    }
}

fn dot<T: Wide>(x: &[f32], y: &[T]) -> f32 {
    let mut sums = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let tail: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(a, b)| a * b.number()).sum();
    for (x, y) in xs.zip(ys) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane].number();
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + e) + (c + g)) + ((b + f) + (d + h)) + tail
}

/// # Safety
/// `(i, j)` is inside the part.
unsafe fn put(out: &mut OutMat, i: usize, j: usize, value: f32, accumulate: bool) {
    // SAFETY: by the caller.
    let place = unsafe { &mut *out.data.add(i * out.stride + j) };
    *place = if accumulate { *place + value } else { value };
}
