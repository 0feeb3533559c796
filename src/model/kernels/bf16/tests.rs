use super::{super::tests::random, *};

/// More rows, columns and pairs than two tiles have, and none that fill them; pairs that fill one and none behind.
const SHAPES: [(usize, usize, usize); 8] =
    [(1, 1, 2), (1, 17, 48), (4, 3, 8), (13, 25, 34), (25, 50, 98), (7, 33, 1536), (37, 16, 64), (70, 49, 106)];

fn narrowed(x: &[f32]) -> Vec<bf16> {
    let mut y = vec![bf16::ZERO; x.len()];
    narrow(x, &mut y);
    y
}

/// Rounding is the `half` crate's, also of ties.
#[test]
fn numbers_are_rounded_to_nearest_even() {
    let ties = (0..64u32).map(|i| f32::from_bits(0x3F80_8000 + (i << 16)));
    let x: Vec<f32> = random(999, 1).into_iter().chain(ties).chain([0.0, -0.0, 1e-40, f32::MAX]).collect();
    for (x, y) in x.iter().zip(narrowed(&x)) {
        assert_eq!(y.to_bits(), bf16::from_f32(*x).to_bits(), "{x}");
    }
}

/// Rows of numbers that bf16 has; of the left side what is not narrow, of the right with a gap between them.
struct Numbers {
    wide: Vec<f32>,
    cols: usize,
}

impl Numbers {
    fn random(rows: usize, cols: usize, seed: u64) -> Self {
        Self { wide: narrowed(&random(rows * cols, seed)).into_iter().map(f32::from).collect(), cols }
    }

    fn row(&self, i: usize) -> &[f32] {
        &self.wide[i * self.cols..][..self.cols]
    }

    /// Some rows, `gap` numbers apart: what lies between must not matter.
    fn left(&self, isa: Isa, rows: std::ops::Range<usize>, gap: usize) -> Rows {
        let padded: Vec<f32> =
            rows.clone().flat_map(|i| self.row(i).iter().copied().chain(vec![f32::INFINITY; gap])).collect();
        Rows::narrow_for(isa, Mat::strided(&padded, rows.len(), self.cols, self.cols + gap))
    }

    fn right(&self, rows: usize, gap: usize) -> (Vec<bf16>, usize) {
        let padded: Vec<f32> =
            (0..rows).flat_map(|i| self.row(i).iter().copied().chain(vec![f32::INFINITY; gap])).collect();
        (narrowed(&padded), self.cols + gap)
    }
}

/// What a product writes to a part of a buffer, whose other numbers stay.
fn written(m: usize, n: usize, old: f32, accumulate: bool, product: impl Fn(&mut OutMat, bool)) -> Vec<f32> {
    let mut out = vec![old; m * (n + 3)];
    // SAFETY: nobody else has the buffer.
    product(&mut unsafe { super::super::Out::new(&mut out, n + 3).part(1, m, n) }, accumulate);
    let (start, rest) = (out[0], &out[1..]);
    assert!(start == old && rest.chunks(n + 3).all(|row| row[n.min(row.len())..].iter().all(|x| *x == old)));
    rest.chunks(n + 3).flat_map(|row| &row[..n]).copied().collect()
}

/// Products in f64 of the rounded numbers against every path, plain and accumulated; and each row alone and among
/// others to the same bits.
#[test]
fn products_agree_with_f64() {
    for isa in Isa::available() {
        for (m, n, k) in SHAPES {
            for k in [k, k - 1] {
                let (a, b) = (Numbers::random(m, k, 3), Numbers::random(n, k, 5));
                let (right, stride) = b.right(n, 1);
                let nt = |rows: std::ops::Range<usize>, out: &mut OutMat, accumulate: bool| {
                    nt(&a.left(isa, rows, 3), Mat::strided(&right, n, k, stride), out, accumulate);
                };
                agrees(&format!("{isa:?} nt {m} {n} {k}"), (&a, &b), (m, n), nt);
                // The columns behind the first two lines, in pairs, of which an odd reduction's last ends with a zero.
                for from in [0, 64].into_iter().filter(|from| *from < k) {
                    let rest = Numbers {
                        wide: b.wide.chunks(k).flat_map(|row| &row[from..]).copied().collect(),
                        cols: k - from,
                    };
                    let mut pairs = vec![[bf16::INFINITY; 2]; (k - from).div_ceil(2) * (n + 5)];
                    for (p, pairs) in pairs.chunks_mut(n + 5).enumerate() {
                        let column =
                            |q: usize| (0..n).map(|j| rest.row(j).get(q).copied().unwrap_or(0.0)).collect::<Vec<_>>();
                        interleave(&column(2 * p), &column(2 * p + 1), &mut pairs[..n]);
                    }
                    let left = Numbers {
                        wide: a.wide.chunks(k).flat_map(|row| &row[from..]).copied().collect(),
                        cols: k - from,
                    };
                    let nn = |rows: std::ops::Range<usize>, out: &mut OutMat, accumulate: bool| {
                        let right = Mat::strided(&pairs, (k - from).div_ceil(2), n, n + 5);
                        nn(&a.left(isa, rows, 4), from, right, out, accumulate);
                    };
                    agrees(&format!("{isa:?} nn {m} {n} {k} from {from}"), (&left, &rest), (m, n), nn);
                }
            }
        }
    }
}

/// `product` writes some rows of `a · bᵀ`.
fn agrees(
    what: &str,
    (a, b): (&Numbers, &Numbers),
    (m, n): (usize, usize),
    product: impl Fn(std::ops::Range<usize>, &mut OutMat, bool),
) {
    for accumulate in [false, true] {
        let out = written(m, n, 0.5, accumulate, |out, add| product(0..m, out, add));
        let start = if accumulate { 0.5 } else { 0.0 };
        for (i, row) in out.chunks(n).enumerate() {
            for (j, got) in row.iter().enumerate() {
                let terms = a.row(i).iter().zip(b.row(j)).map(|(x, y)| f64::from(*x) * f64::from(*y));
                let error = (f64::from(*got) - start - terms.sum::<f64>()).abs();
                assert!(error < 2e-6 * a.cols as f64 + 1e-6, "{what} ({i}, {j}): off by {error}");
            }
            let alone = written(1, n, 0.5, accumulate, |out, add| product(i..i + 1, out, add));
            assert_eq!(alone, row, "{what}: row {i} alone");
        }
    }
}
