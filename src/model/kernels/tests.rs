use super::*;

/// SplitMix64 in `[-1, 1)`.
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

const SHAPES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (1, 17, 48), (4, 3, 8), (5, 25, 31), (9, 50, 97), (13, 24, 576), (7, 133, 5)];

/// Products in f64 against every path, on uneven shapes, plain and accumulated, with strides.
#[test]
fn products_agree_with_f64() {
    for isa in Isa::available() {
        for (m, n, k) in SHAPES {
            let (a, b, bt) = (random(m * (k + 3), 1), random(n * (k + 1), 2), random(k * (n + 2), 3));
            let old = random(m * n, 4);
            let (am, bm) = (Mat::strided(&a[3..], m, k, k + 3), Mat::strided(&b, n, k, k + 1));
            let btm = Mat::strided(&bt, k, n, n + 2);
            for accumulate in [false, true] {
                let (mut x, mut y, mut z) = (old.clone(), old.clone(), old.clone());
                nt_with(isa, am, bm, &mut OutMat::of(&mut x, m, n), accumulate);
                nn_with(isa, am, btm, &mut OutMat::of(&mut y, m, n), accumulate);
                let turned: Vec<f32> = transpose(am).chunks(m).flat_map(|row| [row, &[9.0; 2]].concat()).collect();
                let turned = Mat::strided(&turned, k, m, m + 2).transposed();
                nn_with(isa, turned, btm, &mut OutMat::of(&mut z, m, n), accumulate);
                assert_eq!(y, z, "{isa:?} {m} {n} {k} transposed");
                for i in 0..m {
                    for j in 0..n {
                        let start = if accumulate { f64::from(old[i * n + j]) } else { 0.0 };
                        let at = |p: usize| f64::from(am.data[i * am.stride + p]);
                        let nt: f64 = (0..k).map(|p| at(p) * f64::from(bm.data[j * bm.stride + p])).sum();
                        let nn: f64 = (0..k).map(|p| at(p) * f64::from(btm.data[p * btm.stride + j])).sum();
                        let tolerance = 1e-6 * k as f64 + 1e-6;
                        assert!((f64::from(x[i * n + j]) - start - nt).abs() < tolerance, "{isa:?} nt {m} {n} {k}");
                        assert!((f64::from(y[i * n + j]) - start - nn).abs() < tolerance, "{isa:?} nn {m} {n} {k}");
                    }
                }
            }
        }
    }
}

/// A row's bits are the same alone and among others.
#[test]
fn rows_do_not_depend_on_the_batch() {
    for isa in Isa::available() {
        for (m, n, k) in SHAPES {
            let (a, b, bt) = (random(m * k, 5), random(n * k, 6), random(k * n, 7));
            let (mut x, mut y) = (vec![0.0; m * n], vec![0.0; m * n]);
            nt_with(isa, Mat::new(&a, m, k), Mat::new(&b, n, k), &mut OutMat::of(&mut x, m, n), false);
            nn_with(isa, Mat::new(&a, m, k), Mat::new(&bt, k, n), &mut OutMat::of(&mut y, m, n), false);
            for i in 0..m {
                let row = Mat::new(&a[i * k..][..k], 1, k);
                let (mut x1, mut y1) = (vec![0.0; n], vec![0.0; n]);
                nt_with(isa, row, Mat::new(&b, n, k), &mut OutMat::of(&mut x1, 1, n), false);
                nn_with(isa, row, Mat::new(&bt, k, n), &mut OutMat::of(&mut y1, 1, n), false);
                assert_eq!(x1, x[i * n..][..n], "{isa:?} nt {m} {n} {k}");
                assert_eq!(y1, y[i * n..][..n], "{isa:?} nn {m} {n} {k}");
            }
        }
    }
}

/// Bits, on uneven shapes, strided and accumulated.
#[test]
fn products_with_narrow_numbers_are_those_of_the_same_numbers_in_f32() {
    let codes = |len: usize, seed: u64| -> Vec<i8> { random(len, seed).iter().map(|x| (x * 127.0) as i8).collect() };
    for isa in Isa::available() {
        for (m, n, k) in SHAPES.into_iter().chain([(1, 200, 16)]) {
            let (a, old) = (random(m * k, 8), random(m * n, 9));
            let a = Mat::new(&a, m, k);
            let (b, bt) = (codes(n * (k + 3), 10), codes(k * (n + 1), 11));
            let wide = |x: &[i8]| -> Vec<f32> { x.iter().map(|x| f32::from(*x)).collect() };
            let (wide_b, wide_bt) = (wide(&b), wide(&bt));
            for accumulate in [false, true] {
                let mut found = [old.clone(), old.clone(), old.clone(), old.clone()];
                let [mut nt, mut nn, mut of_wide_nt, mut of_wide_nn] =
                    found.each_mut().map(|out| OutMat::of(out, m, n));
                nt_with(isa, a, Mat::strided(&b, n, k, k + 3), &mut nt, accumulate);
                nn_with(isa, a, Mat::strided(&bt, k, n, n + 1), &mut nn, accumulate);
                nt_with(isa, a, Mat::strided(&wide_b, n, k, k + 3), &mut of_wide_nt, accumulate);
                nn_with(isa, a, Mat::strided(&wide_bt, k, n, n + 1), &mut of_wide_nn, accumulate);
                let [nt, nn, of_wide_nt, of_wide_nn] = found;
                assert_eq!((nt, nn), (of_wide_nt, of_wide_nn), "{isa:?} {m} {n} {k}, {accumulate}");
            }
        }
    }
}

#[test]
fn one_number_that_is_none_is_found_wherever_it_stands() {
    let mut x = vec![1e38f32; 37];
    assert!(elementwise::are_finite(&x));
    for i in 0..x.len() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let good = std::mem::replace(&mut x[i], bad);
            assert!(!elementwise::are_finite(&x), "{bad} at {i}");
            x[i] = good;
        }
    }
}

#[test]
fn exp_is_close() {
    for i in -8000..8000 {
        let x = i as f32 * 0.01;
        let (got, want) = (f64::from(elementwise::exp(x)), f64::from(x).exp());
        assert!((got / want - 1.0).abs() < 4e-7, "exp({x}) is {got}, not {want}");
    }
}

#[test]
fn only_known_kernels_can_be_forced() {
    let error = Isa::force("mmx").unwrap_err();
    assert!(error.contains("portable"), "{error}");
}
