//! Keys and values of sequences while they are served, in pages: a sequence grows page by page, and those that begin
//! alike may share the pages of their beginning. A page that is full does not change any more.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::Result;

use super::ops::Block;

/// Rows of a page.
pub const PAGE: usize = 32;

/// Bytes that the pages of many sequences may take together.
pub struct KvBudget {
    limit: usize,
    used: AtomicUsize,
}

impl KvBudget {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0) })
    }

    pub fn limit(&self) -> usize {
        self.limit
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    pub fn free(&self) -> usize {
        self.limit.saturating_sub(self.used())
    }

    fn take(self: &Arc<Self>, bytes: usize) -> Result<Held> {
        let more = |used: usize| used.checked_add(bytes).filter(|used| *used <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(Held { budget: self.clone(), bytes }),
            Err(_) => candle_core::bail!("keys and values have no room: all {} bytes are taken", self.limit),
        }
    }
}

/// A page's part of the budget; dropping it gives it back.
struct Held {
    budget: Arc<KvBudget>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Keys and values of `PAGE` rows in all layers.
pub struct Page {
    /// `[layer][keys, values][row]`, all key-value heads side by side; keys are rotated.
    numbers: Box<[f32]>,
    held: Held,
}

impl Page {
    pub fn bytes(&self) -> usize {
        self.held.bytes
    }
}

/// Owned by whoever runs the sequence; belongs to one base and one adapter generation.
pub struct SequenceCache {
    layers: usize,
    width: usize,
    budget: Arc<KvBudget>,
    pages: Vec<Arc<Page>>,
    /// Rows that are there in all layers: virtual and text tokens.
    rows: usize,
    /// Text tokens.
    tokens: usize,
    /// Of the pass that goes first, where the adapter has one.
    first: Option<Box<SequenceCache>>,
}

impl SequenceCache {
    /// `width` is that of a row of keys.
    pub(super) fn new(layers: usize, width: usize, budget: Arc<KvBudget>) -> Self {
        Self { layers, width, budget, pages: Vec::new(), rows: 0, tokens: 0, first: None }
    }

    /// With a cache of its own for the first pass, which an adapter has.
    pub fn of_two_passes(mut self) -> Self {
        self.first();
        self
    }

    /// The first pass's.
    pub(super) fn first(&mut self) -> &mut Self {
        let (layers, width, budget) = (self.layers, self.width, &self.budget);
        self.first.get_or_insert_with(|| Box::new(Self::new(layers, width, budget.clone())))
    }

    /// Text tokens that are in the cache (virtual tokens and prefixes not counted).
    pub fn len(&self) -> usize {
        self.tokens
    }

    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// A layer's keys and values, `(rows, kv_heads · head_dim)` each.
    pub fn rows(&self, layer: usize) -> [Vec<f32>; 2] {
        let blocks: Vec<Block> = self.blocks(layer, 0).collect();
        [blocks.iter().flat_map(|b| b.k).copied().collect(), blocks.iter().flat_map(|b| b.v).copied().collect()]
    }

    /// Of all passes.
    pub fn page_bytes(&self) -> usize {
        self.own_page_bytes() + self.first.as_ref().map_or(0, |first| first.page_bytes())
    }

    fn own_page_bytes(&self) -> usize {
        self.layers * 2 * PAGE * self.width * size_of::<f32>()
    }

    /// Pages that have to be made before so many rows more find room.
    pub fn missing(&self, rows: usize) -> usize {
        (self.rows + rows).div_ceil(PAGE).saturating_sub(self.pages.len())
    }

    /// The pages that are full.
    pub fn full_pages(&self) -> &[Arc<Page>] {
        &self.pages[..self.rows / PAGE]
    }

    /// Begins with full pages of another sequence that began with the same tokens, of which the first
    /// `virtual_tokens` are the adapter's.
    pub fn adopt(&mut self, pages: Vec<Arc<Page>>, virtual_tokens: usize) {
        debug_assert!(self.rows == 0 && pages.len() * PAGE > virtual_tokens);
        self.rows = pages.len() * PAGE;
        self.tokens = self.rows - virtual_tokens;
        self.pages = pages;
    }

    /// Makes the pages of rows to come.
    pub(super) fn reserve(&mut self, rows: usize) -> Result<()> {
        for _ in 0..self.missing(rows) {
            let held = self.budget.take(self.own_page_bytes())?;
            let numbers = vec![0.0; self.layers * 2 * PAGE * self.width].into_boxed_slice();
            self.pages.push(Arc::new(Page { numbers, held }));
        }
        Ok(())
    }

    /// Puts the keys and values of new rows behind those that are there, in one layer.
    pub(super) fn write(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<()> {
        let width = self.width;
        for (i, (k, v)) in k.chunks(width).zip(v.chunks(width)).enumerate() {
            let row = self.rows + i;
            let Some(page) = self.pages.get_mut(row / PAGE).and_then(Arc::get_mut) else {
                candle_core::bail!("row {row} of a cache has no page of its own");
            };
            let at = (layer * 2 * PAGE + row % PAGE) * width;
            page.numbers[at..at + width].copy_from_slice(k);
            page.numbers[at + PAGE * width..][..width].copy_from_slice(v);
        }
        Ok(())
    }

    /// A layer's pages, with `new` rows that were written behind those that are there.
    pub(super) fn blocks(&self, layer: usize, new: usize) -> impl Iterator<Item = Block<'_>> {
        let (rows, width) = (self.rows + new, self.width);
        self.pages.iter().enumerate().map_while(move |(i, page)| {
            let n = rows.checked_sub(i * PAGE).filter(|n| *n > 0)?.min(PAGE);
            let start = layer * 2 * PAGE * width;
            let (k, v) = page.numbers[start..start + 2 * PAGE * width].split_at(PAGE * width);
            Some(Block { k: &k[..n * width], v: &v[..n * width], rows: n })
        })
    }

    /// New rows are there in all layers now.
    pub(super) fn finish(&mut self, virtual_tokens: usize, tokens: usize) {
        self.rows += virtual_tokens + tokens;
        self.tokens += tokens;
    }
}
