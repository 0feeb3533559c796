//! One forward for running sequences of one base, whatever their adapters.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{registry::Lease, sequence::Running};
use crate::model::{Batch, Sequence};

/// What a sequence would read in a step of its own.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// What its project has had, then who came first.
    pub arrival: (u64, u64),
    pub tokens: usize,
    /// It makes a token in every step; else it still reads.
    pub is_decoding: bool,
    /// All of them in one step, or none.
    pub is_whole: bool,
}

/// How many tokens each sequence reads in this step. Those that decode go on always; what they leave of `limit` goes
/// to the one whose turn it is, then to the next. A text that is read in one piece may go beyond it.
pub fn share(wishes: &[Wish], limit: usize) -> Vec<usize> {
    let mut shares: Vec<usize> = wishes.iter().map(|wish| usize::from(wish.is_decoding)).collect();
    let mut left = limit.saturating_sub(shares.iter().sum()).max(1);
    let mut reading: Vec<usize> = (0..wishes.len()).filter(|i| !wishes[*i].is_decoding).collect();
    reading.sort_unstable_by_key(|i| wishes[*i].arrival);
    for i in reading {
        let is_taken_whole = wishes[i].is_whole && left > 0;
        shares[i] = if is_taken_whole { wishes[i].tokens } else { wishes[i].tokens.min(left) };
        left = left.saturating_sub(shares[i]);
    }
    shares
}

/// Reads so many tokens of each sequence and lets them take their scores. Rows of one adapter have to stand side by
/// side.
pub fn forward(running: &mut [Running], shares: &[usize]) -> Result<()> {
    let Some(base) = running.first().map(|r| r.resident.base.clone()) else { return Ok(()) };
    let mut chosen: Vec<(&mut Running, Vec<u32>)> = (running.iter_mut().zip(shares))
        .filter(|(_, n)| **n > 0)
        .map(|(r, n)| {
            let tokens = r.next_tokens(*n);
            (r, tokens)
        })
        .collect();
    if chosen.is_empty() {
        return Ok(());
    }
    let sequences = chosen.iter_mut().map(|(r, tokens)| Sequence {
        tokens,
        branches: &[],
        hook: r.lease.clone(),
        cache: Some(&mut r.cache),
    });
    let hidden = base.forward(&mut Batch { sequences: sequences.collect(), train: None })?;
    // Of the rows just computed, those that need scores; and each sequence's places among these.
    let (mut rows, mut places, mut start) = (Vec::<u32>::new(), Vec::new(), 0);
    for (r, tokens) in &chosen {
        let first = rows.len();
        rows.extend(r.wanted_rows(tokens.len()).map(|i| (start + i) as u32));
        places.push(first..rows.len());
        start += tokens.len();
    }
    let leases: Vec<Option<Lease>> = chosen.iter().map(|(r, _)| r.lease.clone()).collect();
    let hooks = places.iter().zip(&leases).filter(|(places, _)| !places.is_empty());
    let hooks: Vec<_> = hooks.map(|(places, lease)| (places.clone(), lease.as_deref())).collect();
    let scores = match rows.is_empty() {
        true => None,
        false => Some(base.scores(&hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?, &hooks)?),
    };
    let mut start = 0;
    for (r, tokens) in &mut chosen {
        if r.is_embedding() {
            r.pool(&hidden.narrow(0, start, tokens.len())?.flatten_all()?.to_vec1::<f32>()?);
        }
        start += tokens.len();
    }
    let rows_of = |places: Range<usize>| scores.iter().flat_map(move |scores| places.clone().map(|i| scores.row(i)));
    chosen.par_iter_mut().zip(places).for_each(|((r, _), places)| r.advance(&rows_of(places).collect::<Vec<_>>()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(arrival: u64, tokens: usize) -> Wish {
        Wish { arrival: (0, arrival), tokens, is_decoding: false, is_whole: false }
    }

    fn decodes(arrival: u64) -> Wish {
        Wish { is_decoding: true, ..reads(arrival, 1) }
    }

    #[test]
    fn who_came_first_reads_first_wherever_it_stands() {
        assert_eq!(share(&[reads(3, 40), reads(1, 7), reads(2, 40)], 16), [0, 7, 9]);
        assert_eq!(share(&[reads(1, 0), reads(2, 1)], 16), [0, 1]);
    }

    #[test]
    fn a_project_that_had_less_reads_first() {
        let of = |rank: u64, wish: Wish| Wish { arrival: (rank, wish.arrival.1), ..wish };
        assert_eq!(share(&[of(9, reads(1, 40)), of(2, reads(5, 10))], 16), [6, 10]);
    }

    #[test]
    fn a_text_that_is_read_in_one_piece_waits_for_its_turn_and_not_for_room() {
        let whole = |arrival, tokens| Wish { is_whole: true, ..reads(arrival, tokens) };
        assert_eq!(share(&[whole(1, 40), reads(2, 7)], 16), [40, 0]);
        assert_eq!(share(&[whole(2, 40), reads(1, 7), whole(3, 4)], 16), [40, 7, 0]);
        assert_eq!(share(&[whole(2, 40), reads(1, 16)], 16), [0, 16]);
    }

    #[test]
    fn decoding_goes_on_and_leaves_at_least_one_token_to_the_oldest_reader() {
        assert_eq!(share(&[decodes(5), reads(9, 40), decodes(2), reads(7, 40)], 10), [1, 0, 1, 8]);
        assert_eq!(share(&[decodes(1), decodes(2), reads(4, 9), reads(3, 9)], 2), [1, 1, 0, 1]);
        assert_eq!(share(&[decodes(1), reads(2, 9)], 0), [1, 1]);
    }
}
