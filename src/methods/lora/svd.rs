//! The largest singular triplets of a matrix, in f64.
//!
//! Exact: the eigenvectors of the smaller Gram matrix. It is made tridiagonal by Householder reflections; eigenvalues
//! come from bisection (Sturm counts), vectors from inverse iteration (Golub and Van Loan, sections 8.3 and 8.4).
//! `B A` of PiSSA is the projection `U Uᵀ W`, so the squared condition of the Gram matrix does no harm there.
//!
//! Randomised (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4): `niter` rounds of subspace iteration on
//! r random directions, as torch's `svd_lowrank(q = r, niter)` does, then the exact way in that subspace.

use rayon::prelude::*;

use crate::domain::rng::Stream;

/// Row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f64>,
}

/// `W ≈ Σ σᵢ uᵢ vᵢᵀ`, largest σ first; `u` and `v` hold a vector a row.
pub struct Svd {
    pub u: Matrix,
    pub s: Vec<f64>,
    pub v: Matrix,
}

impl Matrix {
    pub fn new(rows: usize, cols: usize, data: Vec<f64>) -> Self {
        Self { rows, cols, data }
    }

    fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    fn transposed(&self) -> Self {
        let data = (0..self.cols).flat_map(|j| (0..self.rows).map(move |i| self.data[i * self.cols + j])).collect();
        Self::new(self.cols, self.rows, data)
    }

    /// `self · otherᵀ`
    fn times_transposed(&self, other: &Self) -> Self {
        let row = |i: usize| (0..other.rows).map(|j| dot(self.row(i), other.row(j))).collect::<Vec<_>>();
        let data = (0..self.rows).into_par_iter().flat_map_iter(row).collect();
        Self::new(self.rows, other.rows, data)
    }

    /// `self · other`
    fn times(&self, other: &Self) -> Self {
        let mut data = vec![0.0; self.rows * other.cols];
        data.par_chunks_mut(other.cols.max(1)).enumerate().for_each(|(i, out)| {
            for (j, factor) in self.row(i).iter().enumerate() {
                out.iter_mut().zip(other.row(j)).for_each(|(out, x)| *out += factor * x);
            }
        });
        Self::new(self.rows, other.cols, data)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Four sums at once: a single one waits for itself.
    let (a, b) = (a.as_chunks::<4>(), b.as_chunks::<4>());
    let mut sums = [0.0; 4];
    for (x, y) in a.0.iter().zip(b.0) {
        for k in 0..4 {
            sums[k] += x[k] * y[k];
        }
    }
    sums.iter().sum::<f64>() + a.1.iter().zip(b.1).map(|(x, y)| x * y).sum::<f64>()
}

/// The `r` largest, exactly.
pub fn exact(w: &Matrix, r: usize) -> Svd {
    if w.rows > w.cols {
        let Svd { u, s, v } = exact(&w.transposed(), r);
        return Svd { u: v, s, v: u };
    }
    let u = eigenvectors(w.times_transposed(w), r);
    of_left(u, w)
}

/// The `r` largest, from random directions of `seed`.
pub fn randomised(w: &Matrix, r: usize, niter: usize, seed: u64) -> Svd {
    let directions = Stream::new(seed, 0).normals(r * w.cols).map(f64::from).collect();
    let mut q = orthonormal(Matrix::new(r, w.cols, directions).times_transposed(w)); // (r, rows)
    for _ in 0..niter {
        let back = orthonormal(q.times(w));
        q = orthonormal(back.times_transposed(w));
    }
    let small = q.times(w); // (r, cols)
    let Svd { u, s, v } = exact(&small, r);
    Svd { u: u.times(&q), s, v }
}

/// `σᵢ` and `vᵢ` of given `uᵢ`: `Wᵀ uᵢ = σᵢ vᵢ`. A direction that W sends to nothing keeps a zero `v`.
fn of_left(u: Matrix, w: &Matrix) -> Svd {
    let mut v = u.times(w);
    let mut s = Vec::with_capacity(u.rows);
    for row in v.data.chunks_mut(w.cols) {
        let length = dot(row, row).sqrt();
        if length > 0.0 {
            row.iter_mut().for_each(|x| *x /= length);
        }
        s.push(length);
    }
    Svd { u, s, v }
}

/// Rows made orthonormal (Gram and Schmidt, twice); rows that depend on those before become zero.
fn orthonormal(mut q: Matrix) -> Matrix {
    let n = q.cols;
    for i in 0..q.rows {
        let (before, rest) = q.data.split_at_mut(i * n);
        let row = &mut rest[..n];
        let first = dot(row, row).sqrt();
        for _ in 0..2 {
            for other in before.chunks(n) {
                let along = dot(row, other);
                row.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
            }
        }
        let length = dot(row, row).sqrt();
        let factor = if length > 1e-12 * first { 1.0 / length } else { 0.0 };
        row.iter_mut().for_each(|x| *x *= factor);
    }
    q
}

/// The eigenvectors of a symmetric matrix's `r` largest eigenvalues, one a row.
fn eigenvectors(a: Matrix, r: usize) -> Matrix {
    let n = a.rows;
    let (reflections, diagonal, off) = tridiagonal(a);
    let mut vectors = Matrix::new(0, n, Vec::with_capacity(r * n));
    for i in 0..r.min(n) {
        let vector = inverse_iteration(&diagonal, &off, eigenvalue(&diagonal, &off, i), &vectors, i as u64);
        vectors.data.extend(vector);
        vectors.rows += 1;
    }
    for vector in vectors.data.chunks_mut(n) {
        for (k, h) in reflections.iter().enumerate().rev() {
            reflect(&mut vector[k + 1..], h);
        }
    }
    // Reflections keep lengths and angles up to rounding.
    orthonormal(vectors)
}

/// `x − 2 h (h·x)` for a unit vector h, or none (zero).
fn reflect(x: &mut [f64], h: &[f64]) {
    let along = 2.0 * dot(x, h);
    x.iter_mut().zip(h).for_each(|(x, h)| *x -= along * h);
}

/// `Q A Qᵀ` tridiagonal: the reflections of Q, the diagonal, and the one beside it.
fn tridiagonal(mut a: Matrix) -> (Vec<Vec<f64>>, Vec<f64>, Vec<f64>) {
    let n = a.rows;
    let (mut reflections, mut off) = (Vec::new(), Vec::new());
    for k in 0..n.saturating_sub(1) {
        let mut h: Vec<f64> = (k + 1..n).map(|i| a.data[i * n + k]).collect();
        let length = dot(&h, &h).sqrt();
        let target = if h[0] > 0.0 { -length } else { length };
        off.push(target);
        h[0] -= target;
        let norm = dot(&h, &h).sqrt();
        if norm > 0.0 {
            h.iter_mut().for_each(|x| *x /= norm);
            // A ← A − 2 (h wᵀ + w hᵀ) with p = A h, w = p − (h·p) h
            let p: Vec<f64> =
                (k + 1..n).into_par_iter().map(|i| dot(&a.data[i * n + k + 1..(i + 1) * n], &h)).collect();
            let along = dot(&h, &p);
            let w: Vec<f64> = p.iter().zip(&h).map(|(p, h)| p - along * h).collect();
            a.data[(k + 1) * n..].par_chunks_mut(n).enumerate().for_each(|(i, row)| {
                let (hi, wi) = (2.0 * h[i], 2.0 * w[i]);
                row[k + 1..].iter_mut().zip(h.iter().zip(&w)).for_each(|(x, (h, w))| *x -= hi * w + wi * h);
            });
        } else {
            h.fill(0.0);
        }
        reflections.push(h);
    }
    let diagonal = (0..n).map(|i| a.data[i * n + i]).collect();
    (reflections, diagonal, off)
}

/// The `index`-th largest eigenvalue by bisection.
fn eigenvalue(diagonal: &[f64], off: &[f64], index: usize) -> f64 {
    let beside = |i: usize| off.get(i).map_or(0.0, |x| x.abs()) + i.checked_sub(1).map_or(0.0, |i| off[i].abs());
    let mut low = diagonal.iter().enumerate().map(|(i, d)| d - beside(i)).fold(f64::INFINITY, f64::min);
    let mut high = diagonal.iter().enumerate().map(|(i, d)| d + beside(i)).fold(f64::NEG_INFINITY, f64::max);
    // How many eigenvalues are above x: the signs of the pivots of T − x.
    let above = |x: f64| {
        let mut pivot = 1.0f64;
        diagonal
            .iter()
            .enumerate()
            .filter(|(i, d)| {
                let square = i.checked_sub(1).map_or(0.0, |i| off[i] * off[i]);
                pivot = *d - x - square / if pivot == 0.0 { f64::MIN_POSITIVE } else { pivot };
                pivot > 0.0
            })
            .count()
    };
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        if above(middle) > index { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// The tridiagonal matrix's eigenvector of `value`, orthogonal to those `before`.
fn inverse_iteration(diagonal: &[f64], off: &[f64], value: f64, before: &Matrix, seed: u64) -> Vec<f64> {
    let n = diagonal.len();
    let size = diagonal.iter().chain(off).fold(0f64, |most, x| most.max(x.abs()));
    let size = if size > 0.0 { size } else { 1.0 };
    // A shift just off the eigenvalue, so that the solve is finite.
    let shift = value + 1e-14 * size;
    let mut x: Vec<f64> = Stream::new(seed, 1).normals(n).map(f64::from).collect();
    for _ in 0..4 {
        x = solve(diagonal, off, shift, x, size);
        for _ in 0..2 {
            for other in before.data.chunks(n) {
                let along = dot(&x, other);
                x.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
            }
        }
        let length = dot(&x, &x).sqrt().max(f64::MIN_POSITIVE);
        x.iter_mut().for_each(|x| *x /= length);
    }
    x
}

/// `(T − shift) x = b` by elimination with pivoting between neighbouring rows.
fn solve(diagonal: &[f64], off: &[f64], shift: f64, mut b: Vec<f64>, size: f64) -> Vec<f64> {
    let n = diagonal.len();
    // Row i holds columns i, i + 1, i + 2.
    let mut rows: Vec<[f64; 3]> =
        (0..n).map(|i| [diagonal[i] - shift, off.get(i).copied().unwrap_or(0.0), 0.0]).collect();
    for i in 0..n.saturating_sub(1) {
        let mut below = [off[i], rows[i + 1][0], rows[i + 1][1]];
        if below[0].abs() > rows[i][0].abs() {
            std::mem::swap(&mut rows[i], &mut below);
            b.swap(i, i + 1);
        }
        let factor = if rows[i][0] == 0.0 { 0.0 } else { below[0] / rows[i][0] };
        rows[i + 1] = [below[1] - factor * rows[i][1], below[2] - factor * rows[i][2], 0.0];
        b[i + 1] -= factor * b[i];
    }
    for i in (0..n).rev() {
        let known = |k: usize| b.get(i + k).map_or(0.0, |x| rows[i][k] * x);
        let rest = b[i] - known(1) - known(2);
        let pivot = rows[i][0];
        b[i] = rest / if pivot.abs() < 1e-17 * size { 1e-17 * size } else { pivot };
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        Matrix::new(rows, cols, Stream::new(seed, 9).normals(rows * cols).map(f64::from).collect())
    }

    /// `Σ sᵢ uᵢ vᵢᵀ`
    fn product(svd: &Svd) -> Matrix {
        let mut scaled = svd.v.clone();
        scaled.data.chunks_mut(svd.v.cols).zip(&svd.s).for_each(|(row, s)| row.iter_mut().for_each(|x| *x *= s));
        svd.u.transposed().times(&scaled)
    }

    fn far(a: &Matrix, b: &Matrix) -> f64 {
        a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    fn is_orthonormal(q: &Matrix) -> bool {
        let gram = q.times_transposed(q);
        (0..q.rows).all(|i| (0..q.rows).all(|j| (gram.data[i * q.rows + j] - f64::from(i == j)).abs() < 1e-10))
    }

    #[test]
    fn all_triplets_give_the_matrix_back() {
        for (rows, cols) in [(1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (31, 31), (40, 17)] {
            let w = random(rows, cols, 3);
            let svd = exact(&w, rows.min(cols));
            assert!(far(&product(&svd), &w) < 1e-9, "{rows} × {cols}: {}", far(&product(&svd), &w));
            assert!(is_orthonormal(&svd.u) && is_orthonormal(&svd.v), "{rows} × {cols}");
            assert!(svd.s.is_sorted_by(|a, b| a >= b), "{:?}", svd.s);
        }
    }

    /// Known values, two of them equal, and a matrix of low rank.
    #[test]
    fn known_values_come_out() {
        let (u, v) = (orthonormal(random(6, 20, 1)), orthonormal(random(6, 33, 2)));
        let s = vec![9.0, 4.0, 4.0, 1.0, 0.5, 1e-3];
        let w = product(&Svd { u, s: s.clone(), v });
        let svd = exact(&w, 6);
        for (found, expected) in svd.s.iter().zip(&s) {
            assert!((found - expected).abs() < 1e-9, "{:?}", svd.s);
        }
        assert!(is_orthonormal(&svd.u));
        assert!(far(&product(&svd), &w) < 1e-9);
        // More than there is: the rest is nothing.
        let svd = exact(&w, 8);
        assert!(svd.s[6..].iter().all(|s| *s < 1e-7), "{:?}", svd.s);
        let zero = exact(&Matrix::new(4, 6, vec![0.0; 24]), 2);
        assert!(zero.s.iter().chain(&zero.v.data).all(|x| *x == 0.0));
    }

    /// The residual of the best approximation of rank r is `Σ_{i>r} σᵢ²` (Eckart and Young).
    #[test]
    fn the_largest_are_the_best() {
        let w = random(48, 30, 5);
        let all = exact(&w, 30);
        let square = |m: &Matrix| m.data.iter().map(|x| x * x).sum::<f64>();
        let residual = |svd: &Svd| {
            let p = product(svd);
            square(&Matrix::new(48, 30, w.data.iter().zip(&p.data).map(|(w, p)| w - p).collect()))
        };
        let least: f64 = all.s[4..].iter().map(|s| s * s).sum();
        assert!((residual(&exact(&w, 4)) / least - 1.0).abs() < 1e-9);
        let rough = residual(&randomised(&w, 4, 0, 1));
        let fine = residual(&randomised(&w, 4, 16, 1));
        assert!(rough > 1.05 * least && fine < 1.02 * least && fine >= least * (1.0 - 1e-9), "{rough} {fine} {least}");
        let svd = randomised(&w, 4, 3, 1);
        assert!(is_orthonormal(&svd.u) && is_orthonormal(&svd.v));
    }
}
