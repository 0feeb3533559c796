//! Whether kernels multiply as the portable ones do, asked once before they are chosen: few machines have all of them.
//!
//! The answer is asked for while kernels are chosen, so nothing here may ask which are, nor wait for other threads.

use half::bf16;

use super::{
    Isa, Mat, OutMat,
    bf16::{self as half_products, Pair},
    int8, nn_with, nt_with,
};

/// Whole numbers of at most a size, from a fixed seed.
pub fn whole_numbers(most: i8) -> impl Iterator<Item = i8> {
    let mut state = 1u32;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (((state >> 16) % (2 * most as u32 + 1)) as i32 - i32::from(most)) as i8
    })
}

type Product<'a> = &'a dyn Fn(Isa, &mut OutMat);

/// Of small whole numbers, every order of the sum gives the same: what differs is wrong.
pub fn is_sound(isa: Isa) -> bool {
    // More rows, columns and steps than two tiles have, and a few of each behind; the reduction counts pairs too.
    const M: usize = 37;
    const N: usize = 43;
    const K: usize = 74;
    let mut numbers = whole_numbers(8);
    let mut some = |n: usize| -> Vec<bf16> { numbers.by_ref().take(n).map(|x| bf16::from_f32(x.into())).collect() };
    let (a, b) = (some(M * K), some(N * K));
    let wide = |x: &[bf16]| -> Vec<f32> { x.iter().map(|x| x.to_f32()).collect() };
    let (a32, b32) = (wide(&a), wide(&b));
    let pairs = |x: &[bf16]| x.as_chunks::<2>().0.to_vec();
    let b_pairs: Vec<Pair> = pairs(&b);
    let rows = |isa: Isa| half_products::Rows::narrow_for(isa, Mat::new(&a32, M, K));
    let product = |isa: Isa, f: Product| {
        let mut out = vec![0.5; M * N];
        f(isa, &mut OutMat::of(&mut out, M, N));
        out
    };
    let products: [Product; 4] = [
        &|isa, out| nt_with(isa, Mat::new(&a32, M, K), Mat::new(&b32, N, K), out, true),
        &|isa, out| nn_with(isa, Mat::new(&a32, M, K), Mat::new(&b32, K, N), out, true),
        &|isa, out| half_products::nt(&rows(isa), Mat::new(&b, N, K), out, true),
        &|isa, out| half_products::nn(&rows(isa), 0, Mat::new(&b_pairs, K / 2, N), out, true),
    ];
    products.iter().all(|f| product(isa, f) == product(Isa::Portable, f)) && int8::is_sound(isa)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_of_this_machine_are_sound() {
        for isa in Isa::available() {
            assert!(is_sound(isa), "{isa:?}");
        }
    }
}
