//! One forward for running sequences of one base, whatever their adapters.

use candle_core::{Device, Result, Tensor};

use super::{registry::Lease, sequence::Running};
use crate::model::{Base, Batch, Hook, Sequence};

/// What a sequence would read in a step of its own.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    pub arrival: u64,
    pub tokens: usize,
    /// It makes a token in every step; else it still reads.
    pub is_decoding: bool,
}

/// How many tokens each sequence reads in this step. Those that decode go on always; what they leave of `limit` goes
/// to the one that came first, then to the next.
fn share(wishes: &[Wish], limit: usize) -> Vec<usize> {
    let mut shares: Vec<usize> = wishes.iter().map(|wish| usize::from(wish.is_decoding)).collect();
    let mut left = limit.saturating_sub(shares.iter().sum()).max(1);
    let mut reading: Vec<usize> = (0..wishes.len()).filter(|i| !wishes[*i].is_decoding).collect();
    reading.sort_unstable_by_key(|i| wishes[*i].arrival);
    for i in reading {
        shares[i] = wishes[i].tokens.min(left);
        left -= shares[i];
    }
    shares
}

/// Reads at most `limit` tokens (but one of each that decodes) and lets the sequences take their scores. Rows of one
/// adapter have to stand side by side.
pub fn forward(running: &mut [Running], limit: usize) -> Result<()> {
    let Some(base) = running.first().map(|r| r.resident.base.clone()) else { return Ok(()) };
    let wishes: Vec<Wish> = running.iter().map(Running::wish).collect();
    let shares = share(&wishes, limit);
    let mut chosen: Vec<(&mut Running, Vec<u32>)> = (running.iter_mut().zip(shares))
        .filter(|(_, n)| *n > 0)
        .map(|(r, n)| {
            let tokens = r.next_tokens(n);
            (r, tokens)
        })
        .collect();
    let sequences =
        chosen.iter_mut().map(|(r, tokens)| Sequence { tokens, hook: r.lease.clone(), cache: Some(&mut r.cache) });
    let hidden = base.forward(&mut Batch { sequences: sequences.collect(), train: None })?;
    let mut row = 0;
    // Neighbours with one adapter share the output layer's product.
    for group in chosen.chunk_by_mut(|(a, _), (b, _)| same(&a.lease, &b.lease)) {
        let mut rows: Vec<u32> = Vec::new();
        let mut counts = Vec::with_capacity(group.len());
        for (r, tokens) in &*group {
            let wanted = r.wanted_rows(tokens.len());
            counts.push(wanted.len());
            rows.extend(wanted.map(|i| (row + i) as u32));
            row += tokens.len();
        }
        let lease = group.first().and_then(|(r, _)| r.lease.clone());
        let mut scores = scores(&base, &hidden, rows, lease.as_deref())?.into_iter();
        for ((r, _), n) in group.iter_mut().zip(counts) {
            r.advance(&scores.by_ref().take(n).collect::<Vec<_>>());
        }
    }
    Ok(())
}

fn same(a: &Option<Lease>, b: &Option<Lease>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => std::sync::Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

fn scores(base: &Base, hidden: &Tensor, rows: Vec<u32>, hook: Option<&dyn Hook>) -> Result<Vec<Vec<f32>>> {
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let rows = Tensor::new(rows, &Device::Cpu)?;
    base.logits(&hidden.index_select(&rows, 0)?, hook)?.to_vec2()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(arrival: u64, tokens: usize) -> Wish {
        Wish { arrival, tokens, is_decoding: false }
    }

    fn decodes(arrival: u64) -> Wish {
        Wish { arrival, tokens: 1, is_decoding: true }
    }

    #[test]
    fn who_came_first_reads_first_wherever_it_stands() {
        assert_eq!(share(&[reads(3, 40), reads(1, 7), reads(2, 40)], 16), [0, 7, 9]);
        assert_eq!(share(&[reads(1, 0), reads(2, 1)], 16), [0, 1]);
    }

    #[test]
    fn decoding_goes_on_and_leaves_at_least_one_token_to_the_oldest_reader() {
        assert_eq!(share(&[decodes(5), reads(9, 40), decodes(2), reads(7, 40)], 10), [1, 0, 1, 8]);
        assert_eq!(share(&[decodes(1), decodes(2), reads(4, 9), reads(3, 9)], 2), [1, 1, 0, 1]);
        assert_eq!(share(&[decodes(1), reads(2, 9)], 0), [1, 1]);
    }
}
