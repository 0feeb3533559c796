//! The products in plain Rust; what every other path is checked against.

use super::{Mat, OutMat};

const LANES: usize = 8;

pub fn nt(a: Mat, b: Mat, out: &mut OutMat, accumulate: bool) {
    for i in 0..a.rows {
        let x = &a.data[i * a.stride..][..a.cols];
        for j in 0..b.rows {
            let sum = dot(x, &b.data[j * b.stride..][..b.cols]);
            // SAFETY: `i < out.rows` and `j < out.cols`, and the part was checked to be inside its buffer.
            unsafe { put(out, i, j, sum, accumulate) };
        }
    }
}

pub fn nn(a: Mat, b: Mat, out: &mut OutMat, accumulate: bool) {
    let mut row = vec![0f32; b.cols];
    for i in 0..a.rows {
        row.fill(0.0);
        for p in 0..a.cols {
            let x = a.data[i * a.stride + p * a.step];
            for (sum, y) in row.iter_mut().zip(&b.data[p * b.stride..][..b.cols]) {
                *sum += x * y;
            }
        }
        for (j, sum) in row.iter().enumerate() {
            // SAFETY: as in `nt`.
            unsafe { put(out, i, j, *sum, accumulate) };
        }
    }
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let tail: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(a, b)| a * b).sum();
    for (x, y) in xs.zip(ys) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
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
