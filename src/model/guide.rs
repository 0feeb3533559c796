//! First passes: hooks that see the hidden rows of one before they act in the pass itself.

use candle_core::Result;

use super::{Base, Batch, Sequence, SequenceCache, pass::same};

/// Runs the first passes that a batch's hooks ask for, all in one forward, and puts the hooks made of their rows in the
/// place of these. Neighbours with one hook stay neighbours with one hook.
pub fn guide(base: &Base, batch: &mut Batch) -> Result<()> {
    let train = batch.train;
    let first = |sequence: &Sequence| sequence.hook.as_ref().and_then(|hook| hook.first_pass());
    let mut sequences = Vec::new();
    for group in batch.sequences.chunk_by_mut(|a, b| same(&a.hook, &b.hook)) {
        let Some(hook) = first(&group[0]) else { continue };
        sequences.extend(group.iter_mut().map(|sequence| Sequence {
            tokens: sequence.tokens,
            branches: sequence.branches,
            hook: Some(hook.clone()),
            cache: sequence.cache.as_deref_mut().map(SequenceCache::first),
        }));
    }
    if sequences.is_empty() {
        return Ok(());
    }
    let hidden = base.forward(&mut Batch { sequences, train })?.detach();
    let mut start = 0;
    for group in batch.sequences.chunk_by_mut(|a, b| same(&a.hook, &b.hook)) {
        let Some(hook) = group[0].hook.clone().filter(|hook| hook.first_pass().is_some()) else { continue };
        let rows = group.iter().map(|sequence| sequence.tokens.len()).sum();
        let guided = hook.guided(&hidden.narrow(0, start, rows)?.contiguous()?, train)?;
        start += rows;
        group.iter_mut().for_each(|sequence| sequence.hook = Some(guided.clone()));
    }
    Ok(())
}
