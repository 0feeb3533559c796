//! Keys and values of one sequence while it is served.

/// One layer's rows, all key-value heads side by side; keys are rotated.
#[derive(Default)]
pub struct LayerCache {
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
}

/// Owned by whoever runs the sequence; belongs to one base and one adapter generation.
pub struct SequenceCache {
    pub(super) layers: Vec<LayerCache>,
    /// Text tokens.
    pub(super) tokens: usize,
    /// Rows before the text that an adapter put there: prefix and virtual tokens.
    pub(super) prefix: usize,
    pub(super) virtual_tokens: usize,
}

impl SequenceCache {
    pub(super) fn new(layers: usize) -> Self {
        Self { layers: (0..layers).map(|_| LayerCache::default()).collect(), tokens: 0, prefix: 0, virtual_tokens: 0 }
    }

    /// Text tokens that are in the cache (virtual tokens and prefixes not counted).
    pub fn len(&self) -> usize {
        self.tokens
    }

    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// A layer's keys and values, `(rows, kv_heads · head_dim)` each, with what an adapter put before the text.
    pub fn rows(&self, layer: usize) -> [&[f32]; 2] {
        [&self.layers[layer].k, &self.layers[layer].v]
    }

    /// Memory that the rows hold.
    pub fn bytes(&self) -> usize {
        let floats: usize = self.layers.iter().map(|l| l.k.capacity() + l.v.capacity()).sum();
        floats * size_of::<f32>()
    }
}
