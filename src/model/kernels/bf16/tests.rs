use super::{super::tests::random, *};

/// More rows, columns and pairs than two tiles have, and none that fill them; pairs that fill one and none behind.
const SHAPES: [(usize, usize, usize); 8] =
    [(1, 1, 2), (1, 17, 48), (4, 3, 8), (13, 25, 34), (25, 50, 98), (7, 33, 576), (37, 16, 64), (70, 49, 106)];

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

/// Numbers in rows of `cols`, `stride` apart; what lies between must not matter.
struct Rows {
    numbers: Vec<bf16>,
    cols: usize,
    stride: usize,
}

impl Rows {
    fn random(rows: usize, cols: usize, gap: usize, seed: u64) -> Self {
        let mut numbers = narrowed(&random(rows * (cols + gap), seed));
        for row in numbers.chunks_mut(cols + gap) {
            row[cols..].fill(bf16::INFINITY);
        }
        numbers.truncate(rows * (cols + gap) - gap);
        Self { numbers, cols, stride: cols + gap }
    }

    fn row(&self, i: usize) -> &[bf16] {
        &self.numbers[i * self.stride..][..self.cols]
    }

    fn mat(&self, rows: usize) -> Mat<'_, bf16> {
        Mat::strided(&self.numbers, rows, self.cols, self.stride)
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
            // An odd reduction has no pairs: only `nt` has it.
            for k in [k, k - 1] {
                let (a, b) = (Rows::random(m, k, 3, 3), Rows::random(n, k, 1, 5));
                let nt = |rows: std::ops::Range<usize>, out: &mut OutMat, accumulate: bool| {
                    let left = Mat::strided(&a.numbers[rows.start * a.stride..], rows.len(), k, a.stride);
                    nt_with(isa, left, b.mat(n), out, accumulate);
                };
                agrees(&format!("{isa:?} nt {m} {n} {k}"), &a, &b, (m, n), nt);
            }
            let (a, b) = (Rows::random(m, k, 4, 7), Rows::random(n, k, 1, 9));
            let mut pairs = vec![[bf16::INFINITY; 2]; k / 2 * (n + 5)];
            for (p, pairs) in pairs.chunks_mut(n + 5).enumerate() {
                let column = |q: usize| (0..n).map(|j| b.row(j)[q].to_f32()).collect::<Vec<_>>();
                interleave(&column(2 * p), &column(2 * p + 1), &mut pairs[..n]);
            }
            let left: Vec<Pair> = a.numbers.chunks(2).map(|pair| [pair[0], pair[1]]).collect();
            let nn = |rows: std::ops::Range<usize>, out: &mut OutMat, accumulate: bool| {
                let stride = a.stride / 2;
                let left = Mat::strided(&left[rows.start * stride..], rows.len(), k / 2, stride);
                nn_with(isa, left, Mat::strided(&pairs, k / 2, n, n + 5), out, accumulate);
            };
            agrees(&format!("{isa:?} nn {m} {n} {k}"), &a, &b, (m, n), nn);
        }
    }
}

/// `product` writes some rows of `a · bᵀ`.
fn agrees(
    what: &str,
    a: &Rows,
    b: &Rows,
    (m, n): (usize, usize),
    product: impl Fn(std::ops::Range<usize>, &mut OutMat, bool),
) {
    for accumulate in [false, true] {
        let out = written(m, n, 0.5, accumulate, |out, add| product(0..m, out, add));
        let start = if accumulate { 0.5 } else { 0.0 };
        for (i, row) in out.chunks(n).enumerate() {
            for (j, got) in row.iter().enumerate() {
                let terms = a.row(i).iter().zip(b.row(j)).map(|(x, y)| x.to_f64() * y.to_f64());
                let error = (f64::from(*got) - start - terms.sum::<f64>()).abs();
                assert!(error < 2e-6 * a.cols as f64 + 1e-6, "{what} ({i}, {j}): off by {error}");
            }
            let alone = written(1, n, 0.5, accumulate, |out, add| product(i..i + 1, out, add));
            assert_eq!(alone, row, "{what}: row {i} alone");
        }
    }
}
