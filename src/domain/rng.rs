//! Random numbers by counter: a number is a pure function of a seed, a stream and a place, so nothing has to be
//! remembered to go on after a stop, and no order of calls can change a value.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

/// One stream of one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    stream: [u32; 2],
}

impl Stream {
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { key: halves(seed), stream: halves(stream) }
    }

    /// Uniform in `[0, 1)`, 24 bits, at a place.
    pub fn uniform(&self, place: u64) -> f32 {
        (self.bits(place) >> 8) as f32 / (1 << 24) as f32
    }

    /// The first `n` uniform numbers; the same as `uniform(0..n)`, four at a time.
    pub fn uniforms(&self, n: usize) -> impl Iterator<Item = f32> {
        self.uniforms_from(0, n)
    }

    /// `n` uniform numbers from a place on that is a multiple of four.
    pub fn uniforms_from(&self, place: u64, n: usize) -> impl Iterator<Item = f32> {
        let (stream, first) = (*self, place / 4);
        let blocks = (first..first + n.div_ceil(4) as u64).flat_map(move |block| stream.block(block));
        blocks.take(n).map(|bits| (bits >> 8) as f32 / (1 << 24) as f32)
    }

    /// Standard normal numbers, by Box and Muller.
    pub fn normals(&self, n: usize) -> impl Iterator<Item = f32> {
        let stream = *self;
        let unit = |bits: u32| (f64::from(bits) + 0.5) / 4_294_967_296.0;
        let pair = move |a: u32, b: u32| {
            let (radius, angle) = ((-2.0 * unit(a).ln()).sqrt(), std::f64::consts::TAU * unit(b));
            [(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]
        };
        let blocks = (0..n.div_ceil(4) as u64).map(move |block| stream.block(block));
        blocks.flat_map(move |[a, b, c, d]| [pair(a, b), pair(c, d)].into_iter().flatten()).take(n)
    }

    /// A whole number below `n`, for shuffles: 64 random bits times `n`, the upper half.
    pub fn below(&self, place: u64, n: u64) -> u64 {
        let [a, b, ..] = self.block(place);
        let bits = u64::from(a) << 32 | u64::from(b);
        ((u128::from(bits) * u128::from(n)) >> 64) as u64
    }

    fn bits(&self, place: u64) -> u32 {
        self.block(place / 4)[(place % 4) as usize]
    }

    fn block(&self, counter: u64) -> [u32; 4] {
        let [low, high] = halves(counter);
        philox([low, high, self.stream[0], self.stream[1]], self.key)
    }
}

/// A key made of a seed and numbers, by rounds of SplitMix64's finaliser.
pub fn key(seed: u64, parts: &[u64]) -> u64 {
    parts.iter().fold(finish(seed), |state, part| finish(state ^ finish(*part)))
}

fn finish(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let [low0, high0] = halves(u64::from(counter[0]) * 0xD251_1F53);
        let [low1, high1] = halves(u64::from(counter[2]) * 0xCD9E_8D57);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published known answers of Philox4x32-10 (Random123's kat_vectors).
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn moments_and_streams() {
        let stream = Stream::new(7, 3);
        let numbers: Vec<f32> = stream.uniforms(40_001).collect();
        assert!(numbers.iter().enumerate().all(|(i, x)| *x == stream.uniform(i as u64)));
        assert_eq!(stream.uniforms_from(8, 9).collect::<Vec<_>>(), numbers[8..17]);
        let mean = numbers.iter().sum::<f32>() / numbers.len() as f32;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert_ne!(numbers[..8], Stream::new(7, 4).uniforms(8).collect::<Vec<_>>()[..]);
        assert_ne!(numbers[..8], Stream::new(8, 3).uniforms(8).collect::<Vec<_>>()[..]);

        let normals: Vec<f32> = stream.normals(40_001).collect();
        let mean = normals.iter().sum::<f32>() / normals.len() as f32;
        let square = normals.iter().map(|x| x * x).sum::<f32>() / normals.len() as f32;
        assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.03, "{mean} {square}");
    }

    #[test]
    fn keys_differ_by_each_part() {
        let keys = [key(1, &[2, 3]), key(1, &[3, 2]), key(2, &[2, 3]), key(1, &[2]), key(1, &[2, 3, 0])];
        let distinct: std::collections::BTreeSet<u64> = keys.into_iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }
}
