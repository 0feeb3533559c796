//! Texts as one pass reads them: what several begin with is read once.

use std::{collections::HashMap, sync::Arc};

use crate::{
    data::Example,
    model::{Base, Batch, Hook, Sequence, Target},
};

pub struct Laid<'a> {
    pub texts: &'a [&'a Example],
    /// The trained tokens of all texts, text by text.
    pub targets: Vec<Target>,
    /// Tokens of each sequence, and how many of them each of its branches has.
    sequences: Vec<(Vec<u32>, Vec<usize>)>,
}

impl<'a> Laid<'a> {
    /// Texts with the same start before their first trained token share it: the two sides of a pair, the completions of
    /// a prompt. Each reads its own where that is not [`is_shared`](Self::is_shared).
    pub fn of(base: &Base, hook: Option<&Arc<dyn Hook>>, texts: &'a [&'a Example]) -> Self {
        Self::new(texts, Self::is_shared(base, hook))
    }

    /// Whether one row's numbers are a function of those before it alone, so that texts can have a start in common.
    pub fn is_shared(base: &Base, hook: Option<&Arc<dyn Hook>>) -> bool {
        let is_plain =
            |hook: &Arc<dyn Hook>| hook.first_pass().is_none() && hook.taken().is_none() && !hook.sees_ahead();
        base.info.short_context.is_none() && hook.is_none_or(is_plain)
    }

    fn new(texts: &'a [&'a Example], can_share: bool) -> Self {
        let mut families = Vec::<Vec<usize>>::new();
        let mut known = HashMap::<&[u32], usize>::new();
        for (i, text) in texts.iter().enumerate() {
            let start = &text.ids[..start(text)];
            match known.get(start).copied().filter(|_| can_share && !start.is_empty()) {
                Some(family) => families[family].push(i),
                None => {
                    known.insert(start, families.len());
                    families.push(vec![i]);
                }
            }
        }
        let (mut targets, mut sequences) = (vec![Vec::new(); texts.len()], Vec::with_capacity(families.len()));
        let mut first = 0;
        for family in families {
            let stem = start(texts[family[0]]);
            let mut tokens = texts[family[0]].ids[..stem].to_vec();
            for i in &family {
                let text = texts[*i];
                // Its own rows follow those of its siblings; the first of them is predicted by the start's last row.
                let (at, own) = (first + tokens.len(), &text.ids[stem..]);
                let row = |place: usize| if place < stem { first + place } else { at + place - stem };
                let trained = text.labels.iter().enumerate().skip(1);
                let target = |(place, label): (usize, &Option<u32>)| {
                    label.map(|token| Target { row: row(place - 1), token, weight: 1.0 })
                };
                targets[*i] = trained.filter_map(target).collect();
                tokens.extend(own);
            }
            first += tokens.len();
            let lengths = family.iter().map(|i| texts[*i].ids.len() - stem);
            let branches = if family.len() > 1 { lengths.filter(|n| *n > 0).collect() } else { Vec::new() };
            sequences.push((tokens, branches));
        }
        Self { texts, targets: targets.concat(), sequences }
    }

    /// Tokens of each sequence.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        self.sequences.iter().map(|(tokens, _)| tokens.len())
    }

    pub fn batch<'b>(&'b self, hook: Option<&Arc<dyn Hook>>) -> Batch<'b> {
        let sequence = |(tokens, branches): &'b (Vec<u32>, Vec<usize>)| Sequence {
            tokens,
            branches,
            hook: hook.cloned(),
            cache: None,
        };
        Batch { sequences: self.sequences.iter().map(sequence).collect(), train: None }
    }
}

/// Tokens before the first trained one.
fn start(text: &Example) -> usize {
    text.labels.iter().position(Option::is_some).unwrap_or(text.ids.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(prompt: &[u32], answer: &[u32]) -> Example {
        let labels = prompt.iter().map(|_| None).chain(answer.iter().copied().map(Some)).collect();
        Example { line: 1, ids: [prompt, answer].concat(), labels }
    }

    fn targets(laid: &Laid) -> Vec<(usize, u32)> {
        laid.targets.iter().map(|target| (target.row, target.token)).collect()
    }

    #[test]
    fn what_texts_begin_with_is_there_once_and_targets_keep_their_order() {
        let texts = [text(&[1, 2], &[3, 4]), text(&[1], &[2, 3]), text(&[1, 2], &[5]), text(&[], &[9, 8])];
        let texts: Vec<&Example> = texts.iter().collect();
        let laid = Laid::new(&texts, true);
        let expected = [(vec![1, 2, 3, 4, 5], vec![2, 1]), (vec![1, 2, 3], vec![]), (vec![9, 8], vec![])];
        assert_eq!(laid.sequences, expected);
        // The first answer's second token is predicted by a row of its own, and so is nothing of the third text.
        assert_eq!(targets(&laid), [(1, 3), (2, 4), (5, 2), (6, 3), (1, 5), (8, 8)]);
        let apart = Laid::new(&texts, false);
        assert!(
            apart.sequences.iter().zip(&texts).all(|((ids, branches), text)| *ids == text.ids && branches.is_empty())
        );
        assert_eq!(targets(&apart), [(1, 3), (2, 4), (4, 2), (5, 3), (8, 5), (10, 8)]);
    }

    #[test]
    fn prompts_alone_are_one_sequence() {
        let texts = [text(&[1, 2], &[]), text(&[1, 2], &[]), text(&[1, 2], &[3])];
        let texts: Vec<&Example> = texts.iter().collect();
        let laid = Laid::new(&texts, true);
        assert_eq!((laid.sequences.clone(), targets(&laid)), (vec![(vec![1, 2, 3], vec![1])], vec![(1, 3)]));
    }
}
