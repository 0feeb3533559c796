//! Dropout whose mask is a function of the pass's key and a place, so that a resumed run draws the same one.

use candle_core::{Result, Tensor};

use crate::{domain::rng::Stream, model::ops};

/// `x` with each number dropped with probability `p` and the others scaled by `1/(1−p)`; none where there is nothing
/// to drop. `place` tells the layers and modules of a pass apart.
pub fn dropout(x: &Tensor, p: f64, train: Option<u64>, place: u64) -> Result<Option<Tensor>> {
    let Some(key) = train.filter(|_| p > 0.0) else { return Ok(None) };
    Ok(Some(ops::dropout(x, p, Stream::new(key, place))?))
}
