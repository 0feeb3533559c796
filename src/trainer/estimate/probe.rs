//! Short passes of a method over its base: what their graphs hold, and how fast they go.

use std::{collections::HashSet, iter, time::Instant};

use candle_core::{Result, Storage, Tensor};

use crate::{
    data::Example,
    methods::Trainable,
    model::{Base, Batch, Keep, Sequence, Tape, ops},
    objectives::supervised,
};

/// Bytes that a whole graph keeps for a sequence of `n` tokens: `fixed + token · n + square · n²`. The last is zero but
/// for methods whose attention is made of plain ops.
pub struct Probe {
    fixed: f64,
    token: f64,
    square: f64,
}

impl Probe {
    pub fn measure(base: &Base, method: &dyn Trainable) -> Result<Self> {
        const N: f64 = 8.0;
        let of =
            |n: usize| -> Result<f64> { Ok(kept(&pass(base, method, Keep::Everything, &row(n, base.info.vocab))?.1)) };
        let [a, b, c] = [of(N as usize)?, of(2 * N as usize)?, of(4 * N as usize)?];
        // Through the three points at N, 2N and 4N.
        let square = ((c - b) / (2.0 * N) - (b - a) / N) / (3.0 * N);
        let token = (b - a) / N - 3.0 * N * square;
        Ok(Self { fixed: a - N * token - N * N * square, token, square })
    }

    /// Bytes that the graph of these sequences keeps.
    pub fn kept(&self, lengths: &[usize]) -> u64 {
        let of = |n: f64| self.fixed + self.token * n + self.square * n * n;
        lengths.iter().map(|n| of(*n as f64)).sum::<f64>().max(0.0) as u64
    }
}

/// Tokens a second, forward and backward.
pub fn speed(base: &Base, method: &dyn Trainable, keep: Keep, tokens: usize) -> Result<f64> {
    let row = row(tokens, base.info.vocab);
    let since = Instant::now();
    let (tape, loss) = pass(base, method, keep, &row)?;
    tape.backward(base, &loss, |_| Ok(()))?;
    Ok(tokens as f64 / since.elapsed().as_secs_f64())
}

fn row(n: usize, vocab: usize) -> Example {
    let ids: Vec<u32> = (0..n).map(|i| (i * 7919 % vocab) as u32).collect();
    Example { line: 0, labels: ids.iter().copied().map(Some).collect(), ids }
}

/// The graph behind the loss of one row, as training makes it.
fn pass(base: &Base, method: &dyn Trainable, keep: Keep, row: &Example) -> Result<(Tape, Tensor)> {
    let (mut tape, key) = (Tape::new(keep), Some(0));
    let hook = method.hook(key)?;
    let sequences = vec![Sequence { tokens: &row.ids, branches: &[], hook: Some(hook.clone()), cache: None }];
    let hidden = tape.forward(base, Batch { sequences, train: key })?;
    // A head of scores or labels has no words to be wrong about.
    let loss = match hook.task_head().is_some() {
        true => base.logits(&hidden, Some(hook.as_ref()))?.sum_all()?,
        false => base.cross_entropy(&hidden, &supervised::targets([row.labels.as_slice()]), Some(hook.as_ref()))?.loss,
    };
    let loss = match hook.penalty()? {
        Some(penalty) => (loss + penalty)?,
        None => loss,
    };
    Ok((tape, loss))
}

/// Bytes of all that a graph holds, variables aside.
fn kept(loss: &Tensor) -> f64 {
    let (variables, nodes): (Vec<_>, Vec<_>) = loss.sorted_nodes().into_iter().partition(|node| node.is_variable());
    let mut seen: HashSet<_> = variables.into_iter().map(|variable| place(variable).0).collect();
    let all = nodes.into_iter().flat_map(|node| iter::once(node.clone()).chain(ops::saved(node)));
    let bytes = |held: Tensor| Some(place(&held)).filter(|(at, _)| seen.insert(*at)).map_or(0, |(_, bytes)| bytes);
    all.map(bytes).sum::<usize>() as f64
}

/// Where a tensor's numbers are, and how many bytes there.
fn place(tensor: &Tensor) -> (*const Storage, usize) {
    let (storage, _) = tensor.storage_and_layout();
    let bytes = match &*storage {
        Storage::Cpu(cpu) => cpu.as_slice::<f32>().map_or(0, size_of_val),
        _ => 0,
    };
    (std::ptr::from_ref(&*storage), bytes)
}
