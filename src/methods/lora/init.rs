//! The first values of A and B.

use crate::domain::{
    BaseInfo, Site,
    rng::Stream,
    spec::{LoraInit, LoraTarget},
};

/// `(A, B)` of one linear, row by row. Kaiming-uniform with a = √5 is uniform in ±1/√fan_in, as PyTorch fills a
/// linear; B is zero, so that a fresh adapter is the base itself.
pub fn values(init: &LoraInit, target: &LoraTarget, base: &BaseInfo, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let (outputs, inputs) = base.shape(target.site);
    let place = (target.layer * 8 + target.site as usize) as u64;
    let (for_a, for_b) = (Stream::new(seed, 2 * place), Stream::new(seed, 2 * place + 1));
    let (a_len, b_len) = (target.r * inputs, outputs * target.r);
    match init {
        // PEFT turns them around for an embedding.
        LoraInit::Flag(false) if target.site == Site::Embed => {
            (for_a.normals(a_len).collect(), for_b.normals(b_len).collect())
        }
        _ if target.site == Site::Embed => (vec![0.0; a_len], for_b.normals(b_len).collect()),
        LoraInit::Flag(true) => (uniform(for_a, a_len, inputs), vec![0.0; b_len]),
        LoraInit::Flag(false) => (uniform(for_a, a_len, inputs), uniform(for_b, b_len, target.r)),
        // The others are PiSSA, which needs the weights.
        LoraInit::Named(_) => {
            let deviation = 1.0 / target.r as f32;
            (for_a.normals(a_len).map(|x| x * deviation).collect(), vec![0.0; b_len])
        }
    }
}

fn uniform(stream: Stream, n: usize, fan_in: usize) -> Vec<f32> {
    let bound = 1.0 / (fan_in as f32).sqrt();
    stream.uniforms(n).map(|u| (2.0 * u - 1.0) * bound).collect()
}
