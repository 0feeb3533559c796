//! The int8 product in plain Rust.

use super::{
    super::OutMat,
    Rows,
    panel::{LANES, Panel},
};

pub fn nt(x: &Rows, panel: &Panel, out: &mut OutMat) {
    let (lines, scales, mins) = panel.parts();
    let steps = panel.block() / 4;
    for i in 0..x.rows {
        let (codes, x_scales, x_sums) = x.row(i);
        let mut totals = [0f32; LANES];
        for (b, lines) in lines.chunks_exact(steps).enumerate() {
            let mut dots = [0i32; LANES];
            for (line, codes) in lines.iter().zip(codes[b * panel.block()..].as_chunks::<4>().0) {
                for (dot, word) in dots.iter_mut().zip(line.0) {
                    let [a, b, c, d] = word.to_le_bytes().map(i32::from);
                    let [p, q, r, s] = codes.map(i32::from);
                    *dot += a * p + b * q + c * r + d * s;
                }
            }
            for lane in 0..LANES {
                totals[lane] += dots[lane] as f32 * (scales[b].0[lane] * x_scales[b]);
                totals[lane] += mins[b].0[lane] * x_sums[b];
            }
        }
        for (j, total) in totals.into_iter().enumerate().take(out.cols) {
            // SAFETY: row and column lie inside the part, whose shape the caller has checked.
            unsafe { *out.data.add(i * out.stride + j) = total };
        }
    }
}
