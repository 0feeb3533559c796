//! What sequences have read is kept while there is room: one that begins alike, for the same project and with the same
//! adapter, shares its pages instead of reading again.
//!
//! A page is known by the hash of all tokens up to its end and of the generation that read them, so that pages never
//! serve another adapter, whatever its name.

use std::{collections::HashMap, ops::Range, sync::Arc};

use sha2::{Digest, Sha256};

use super::sequence::Running;
use crate::model::cache::{PAGE, Page};

type Name = [u8; 32];

/// How far a sequence's pages are known here.
#[derive(Clone, Copy)]
pub struct Chain {
    name: Name,
    pages: usize,
}

struct Known {
    page: Arc<Page>,
    /// When a sequence last had it.
    used: u64,
    /// Of its sequence's pages: those behind go first.
    place: usize,
}

#[derive(Default)]
pub struct Prefixes {
    pages: HashMap<Name, Known>,
    clock: u64,
}

impl Chain {
    /// Nothing read yet. None where the adapter has no name to tell it from others, a first pass, whose pages would
    /// have to be shared as well, or rows that depend on what stands behind them.
    pub fn start(running: &Running) -> Option<Self> {
        let request = &running.request;
        if running.lease.as_ref().is_some_and(|lease| lease.first_pass().is_some() || lease.sees_ahead()) {
            return None;
        }
        let generation = match (&request.adapter, &running.lease) {
            (Some(adapter), _) => adapter.generation.as_str(),
            (None, None) => "",
            (None, Some(_)) => return None,
        };
        let mut hash = Sha256::new();
        for part in [&request.base, &request.project, generation] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Some(Self { name: hash.finalize().into(), pages: 0 })
    }

    /// With the next page, of these tokens.
    fn with(&self, tokens: impl Iterator<Item = u32>) -> Self {
        let mut hash = Sha256::new_with_prefix(self.name);
        tokens.for_each(|token| hash.update(token.to_le_bytes()));
        Self { name: hash.finalize().into(), pages: self.pages + 1 }
    }

    /// With the next page of a sequence, if that ends among its first `most` tokens.
    fn next_before(&self, running: &Running, most: usize) -> Option<Self> {
        let tokens = self.next(running.virtual_tokens());
        (tokens.end <= most).then(|| self.with(running.tokens(tokens)))
    }

    /// The text tokens of the next page, where so many virtual ones stand before the text.
    fn next(&self, virtual_tokens: usize) -> Range<usize> {
        let text = |row: usize| row.saturating_sub(virtual_tokens);
        text(self.pages * PAGE)..text((self.pages + 1) * PAGE)
    }
}

impl Prefixes {
    /// The pages that a sequence that has read nothing yet can begin with, and their place in the chain. At least one
    /// token is left to be read.
    pub fn find(&mut self, running: &Running) -> Option<(Chain, Vec<Arc<Page>>)> {
        let (mut chain, mut pages) = (Chain::start(running).filter(|_| running.may_share())?, Vec::new());
        self.clock += 1;
        while let Some(next) = chain.next_before(running, running.known().saturating_sub(1)) {
            let Some(known) = self.pages.get_mut(&next.name) else { break };
            known.used = self.clock;
            pages.push(known.page.clone());
            chain = next;
        }
        (chain.next(running.virtual_tokens()).start > 0).then_some((chain, pages))
    }

    /// Whether one of the batch is about to read the page that a sequence would have to read behind those it can begin
    /// with.
    pub fn is_coming(&mut self, waiting: &Running, batch: &[Running]) -> bool {
        let Some(start) = Chain::start(waiting).filter(|_| waiting.may_share()) else { return false };
        let known = self.find(waiting).map_or(start, |(chain, _)| chain);
        let Some(missing) = known.next_before(waiting, waiting.known().saturating_sub(1)) else { return false };
        let coming = |running: &Running| running.chain?.next_before(running, running.known());
        batch.iter().filter_map(coming).any(|coming| coming.name == missing.name)
    }

    /// Remembers the pages that a sequence has filled.
    pub fn keep(&mut self, running: &mut Running) {
        let Some(mut chain) = running.chain else { return };
        self.clock += 1;
        while let Some(page) = running.cache.full_pages().get(chain.pages) {
            let place = chain.pages;
            chain = chain.with(running.tokens(chain.next(running.virtual_tokens())));
            let known = self.pages.entry(chain.name).or_insert_with(|| Known { page: page.clone(), used: 0, place });
            known.used = self.clock;
        }
        running.chain = Some(chain);
    }

    fn free(&self) -> impl Iterator<Item = (&Name, &Known)> {
        self.pages.iter().filter(|(_, known)| Arc::strong_count(&known.page) == 1)
    }

    /// Bytes of pages that no sequence has.
    pub fn evictable(&self) -> usize {
        self.free().map(|(_, known)| known.page.bytes()).sum()
    }

    /// Forgets pages that no sequence has, those first that were not used for longest, until so many bytes are free;
    /// says how many became free.
    pub fn evict(&mut self, bytes: usize) -> usize {
        let mut free: Vec<_> = self
            .free()
            .map(|(name, known)| (known.used, usize::MAX - known.place, *name, known.page.bytes()))
            .collect();
        free.sort_unstable();
        let mut freed = 0;
        for (.., name, size) in free {
            if freed >= bytes {
                break;
            }
            self.pages.remove(&name);
            freed += size;
        }
        freed
    }
}
