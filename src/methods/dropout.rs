//! Dropout whose mask is a function of the pass's key and a place, so that a resumed run draws the same one.

use candle_core::{Result, Tensor};

use crate::domain::rng::Stream;

/// `x` with each number dropped with probability `p` and the others scaled by `1/(1−p)`; none where there is nothing
/// to drop. `place` tells the layers and modules of a pass apart.
pub fn dropout(x: &Tensor, p: f64, train: Option<u64>, place: u64) -> Result<Option<Tensor>> {
    let Some(key) = train.filter(|_| p > 0.0) else { return Ok(None) };
    let kept = (1.0 / (1.0 - p)) as f32;
    let stream = Stream::new(key, place);
    let uniforms = stream.uniforms(x.elem_count());
    let mask: Vec<f32> = uniforms.map(|u| if f64::from(u) < p { 0.0 } else { kept }).collect();
    Ok(Some((x * Tensor::from_vec(mask, x.shape(), x.device())?)?))
}
