//! One forward pass over some rows.

use std::sync::Arc;

use candle_core::Result;

use crate::{
    data::Example,
    model::{Base, Batch, CrossEntropy, Hook, Sequence},
    objectives::supervised,
};

/// Loss and hits of rows that carry `hook`. With a key, dropout is drawn from it. `packing` asks for rows one behind
/// another; that is how every batch is laid out, without padding, so the losses do not depend on it.
pub fn cross_entropy(base: &Base, hook: &Arc<dyn Hook>, rows: &[&Example], train: Option<u64>) -> Result<CrossEntropy> {
    let sequences =
        rows.iter().map(|row| Sequence { tokens: &row.ids, hook: Some(hook.clone()), cache: None }).collect();
    let hidden = base.forward(&mut Batch { sequences, train })?;
    base.cross_entropy(&hidden, &supervised::targets(rows.iter().map(|row| row.labels.as_slice())), Some(hook.as_ref()))
}
