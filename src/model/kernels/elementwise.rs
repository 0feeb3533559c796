//! Loops over rows, compiled once for AVX2 and once for any machine.

use std::ops::Range;

use super::Isa;

/// Runs a body compiled for the chosen instructions: the compiler vectorises the same plain Rust twice.
macro_rules! by_isa {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $type:ty),*) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        pub fn $name($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn plain($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $type),*) $(-> $ret)? { plain($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512($($arg: $type),*) $(-> $ret)? { plain($($arg),*) }
            match Isa::chosen() {
                Isa::Portable => plain($($arg),*),
                // SAFETY: `Isa::available` found the instructions.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Amx => unsafe { avx512($($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                Isa::Avx2 | Isa::Avx512 | Isa::Amx => plain($($arg),*),
            }
        }
    };
}
pub(crate) use by_isa;

/// eˣ to 2 units in the last place, without branches, so that loops of it vectorise (Cephes' polynomial).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.336_54, 88.376_26);
    let n = (x * std::f32::consts::LOG2_E + 0.5).floor();
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_3e-1] {
        p = p * r + c;
    }
    let y = p * r * r + r + 1.0;
    // n is in -126..=127 after the clamp, so the exponent is a normal number's.
    y * f32::from_bits((((n as i32) + 127) as u32) << 23)
}

by_isa! {
    /// Turns scores into probabilities in place; returns `ln Σ eˣ`.
    pub fn softmax(row: &mut [f32]) -> f32 {
        let max = max_of(row);
        for x in row.iter_mut() {
            *x = exp(*x - max);
        }
        let sum = sum_of(row);
        let scale = 1.0 / sum;
        for x in row.iter_mut() {
            *x *= scale;
        }
        max + sum.ln()
    }
}

by_isa! {
    /// Turns columns of scores into probabilities in place: `scores` is `(keys, m)`, and `seen` has the columns of each
    /// row that see it, the others become 0. Every column sees a row.
    pub fn softmax_columns(scores: &mut [f32], m: usize, scale: f32, seen: &[Range<usize>]) {
        let (mut most, mut sums) = (vec![f32::NEG_INFINITY; m], vec![0f32; m]);
        for (row, seen) in scores.chunks_exact_mut(m).zip(seen) {
            row[..seen.start].fill(f32::NEG_INFINITY);
            row[seen.end..].fill(f32::NEG_INFINITY);
            for (x, most) in row.iter_mut().zip(most.iter_mut()) {
                *x *= scale;
                *most = if *x > *most { *x } else { *most };
            }
        }
        for (row, seen) in scores.chunks_exact_mut(m).zip(seen) {
            for (x, most) in row.iter_mut().zip(&most) {
                *x = exp(*x - most);
            }
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += *x;
            }
        }
        for sum in &mut sums {
            *sum = 1.0 / *sum;
        }
        for row in scores.chunks_exact_mut(m) {
            for (x, sum) in row.iter_mut().zip(&sums) {
                *x *= sum;
            }
        }
    }
}

by_isa! {
    /// The gradient of `softmax_columns` for its scores, in place of that for the probabilities `p`:
    /// `ds = scale · p ⊙ (dp − Σ p dp)`, the sum over each column.
    pub fn softmax_columns_backward(p: &[f32], dp: &mut [f32], m: usize, scale: f32) {
        let mut means = vec![0f32; m];
        for (p, dp) in p.chunks_exact(m).zip(dp.chunks_exact(m)) {
            for ((mean, p), dp) in means.iter_mut().zip(p).zip(dp) {
                *mean += p * dp;
            }
        }
        for (p, dp) in p.chunks_exact(m).zip(dp.chunks_exact_mut(m)) {
            for ((dp, p), mean) in dp.iter_mut().zip(p).zip(&means) {
                *dp = p * (*dp - mean) * scale;
            }
        }
    }
}

/// The largest value, in eight lanes.
#[inline(always)]
fn max_of(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let chunks = row.chunks_exact(8);
    let tail = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.into_iter().fold(tail, f32::max)
}

/// The sum, in eight lanes and then the rest: zeros at the end do not change it.
#[inline(always)]
pub fn sum_of(row: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let chunks = row.chunks_exact(8);
    let tail = chunks.remainder();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x);
    }
    lanes.iter_mut().zip(tail).for_each(|(lane, x)| *lane += x);
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// `Σ x·y`, in eight lanes.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (xs, ys) = (x.chunks_exact(8), y.chunks_exact(8));
    let tail: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(a, b)| a * b).sum();
    for (x, y) in xs.zip(ys) {
        for i in 0..8 {
            lanes[i] += x[i] * y[i];
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h)) + tail
}

by_isa! {
    /// Whether none is an infinity or no number.
    pub fn are_finite(x: &[f32]) -> bool {
        let mut lanes = [0f32; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for x in chunks {
            // 0 of what is finite, no number of what is not.
            lanes.iter_mut().zip(x).for_each(|(lane, x)| *lane += x * 0.0);
        }
        lanes.iter().chain(rest).all(|x| x.is_finite())
    }
}

by_isa! {
    /// One row of RMSNorm: `y = x · w / √(mean x² + ε)`.
    pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * scale * w;
        }
    }
}

by_isa! {
    /// One row of RMSNorm's gradient: with `s = 1/√(mean x² + ε)`, `dx = s·(g⊙w) − x · s³ · mean(g⊙w⊙x)`.
    pub fn rms_norm_backward(x: &[f32], w: &[f32], eps: f32, g: &[f32], dx: &mut [f32]) {
        let n = x.len() as f32;
        let scale = 1.0 / (dot(x, x) / n + eps).sqrt();
        for ((dx, g), w) in dx.iter_mut().zip(g).zip(w) {
            *dx = g * w;
        }
        let mean = dot(dx, x) / n * scale * scale * scale;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = *dx * scale - x * mean;
        }
    }
}

by_isa! {
    /// `z = silu(gate) ⊙ up`
    pub fn swiglu(gate: &[f32], up: &[f32], z: &mut [f32]) {
        for ((z, g), u) in z.iter_mut().zip(gate).zip(up) {
            *z = g / (1.0 + exp(-*g)) * u;
        }
    }
}

by_isa! {
    /// Gradients of `swiglu` for both arguments.
    pub fn swiglu_backward(gate: &[f32], up: &[f32], dz: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let arguments = gate.iter().zip(up).zip(dz);
        for (((g, u), dz), (dg, du)) in arguments.zip(dgate.iter_mut().zip(dup)) {
            let s = 1.0 / (1.0 + exp(-*g));
            *du = dz * g * s;
            *dg = dz * u * s * (1.0 + g * (1.0 - s));
        }
    }
}

/// `(σ(2u), du/dx)` with `u = √(2/π) (x + 0.044715 x³)`: GELU in its tanh form is `x σ(2u)`.
#[inline(always)]
fn gelu_parts(x: f32) -> (f32, f32) {
    const ROOT: f32 = 0.797_884_6;
    const CUBE: f32 = 0.044_715;
    let u = ROOT * (x + CUBE * x * x * x);
    (1.0 / (1.0 + exp(-2.0 * u)), ROOT * (1.0 + 3.0 * CUBE * x * x))
}

by_isa! {
    /// `z = gelu(gate) ⊙ up`
    pub fn geglu(gate: &[f32], up: &[f32], z: &mut [f32]) {
        for ((z, g), u) in z.iter_mut().zip(gate).zip(up) {
            *z = g * gelu_parts(*g).0 * u;
        }
    }
}

by_isa! {
    /// Gradients of `geglu` for both arguments.
    pub fn geglu_backward(gate: &[f32], up: &[f32], dz: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let arguments = gate.iter().zip(up).zip(dz);
        for (((g, u), dz), (dg, du)) in arguments.zip(dgate.iter_mut().zip(dup)) {
            let (s, slope) = gelu_parts(*g);
            *du = dz * g * s;
            *dg = dz * u * s * (1.0 + 2.0 * g * (1.0 - s) * slope);
        }
    }
}

by_isa! {
    /// Rotates the halves of one head: `(a, b) → (a·cos − b·sin, b·cos + a·sin)`; `sign` −1 turns back.
    pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let (low, high) = head.split_at_mut(cos.len());
        for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (x, y, s) = (*a, *b, s * sign);
            *a = x * c - y * s;
            *b = y * c + x * s;
        }
    }
}
