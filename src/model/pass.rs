//! One forward pass through the decoder: which rows belong to whom, and where the hooks are called.

use std::{ops::Range, sync::Arc};

use candle_core::{Device, Result, Tensor};

use super::{
    At, Base, Batch, Hook, Linear,
    cache::LayerCache,
    gated::gated_attention,
    low_rank::add_low_rank,
    ops::{self, Span},
};
use crate::domain::Site;

/// Neighbouring sequences with one adapter.
struct Group {
    hook: Option<Arc<dyn Hook>>,
    rows: Range<usize>,
    sequences: Range<usize>,
    /// Rows of each sequence.
    lengths: Vec<usize>,
}

impl Group {
    /// The hook that has to be called inside the layers: one of low-rank changes is not.
    fn active(&self) -> Option<&Arc<dyn Hook>> {
        self.hook.as_ref().filter(|hook| hook.low_rank().is_none())
    }
}

/// Rows that one active hook maps, or neighbouring groups without one.
struct Piece {
    group: Option<usize>,
    rows: Range<usize>,
}

/// Neighbours without an active hook are one piece.
fn pieces(groups: &[Group]) -> Vec<Piece> {
    let mut pieces = Vec::<Piece>::new();
    for (i, group) in groups.iter().enumerate() {
        let active = group.active().map(|_| i);
        match pieces.last_mut().filter(|last| last.group.is_none() && active.is_none()) {
            Some(last) => last.rows.end = group.rows.end,
            None => pieces.push(Piece { group: active, rows: group.rows.clone() }),
        }
    }
    pieces
}

pub(super) struct Pass {
    groups: Vec<Group>,
    pieces: Vec<Piece>,
    /// Rows of each sequence, virtual ones included.
    rows: Vec<Range<usize>>,
    /// Virtual rows at the start of each sequence's rows.
    virtual_rows: Vec<usize>,
    positions: Arc<Vec<u32>>,
    train: Option<u64>,
}

fn same(a: &Option<Arc<dyn Hook>>, b: &Option<Arc<dyn Hook>>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    }
}

impl Pass {
    pub fn new(base: &Base, batch: &Batch) -> Result<Self> {
        let cached = batch.sequences.iter().filter(|s| s.cache.is_some()).count();
        if batch.sequences.is_empty() || ![0, batch.sequences.len()].contains(&cached) {
            candle_core::bail!("a batch needs sequences, and a cache for all or none of them");
        }
        let (mut groups, mut rows, mut virtual_rows) = (Vec::<Group>::new(), Vec::new(), Vec::new());
        let (mut positions, mut start) = (Vec::new(), 0);
        for (i, sequence) in batch.sequences.iter().enumerate() {
            let hook = sequence.hook.as_deref();
            let past = sequence.cache.as_ref().map_or(0, |cache| cache.tokens);
            let (virtual_tokens, prefix) = hook.map_or((0, 0), |h| (h.virtual_tokens(), h.prefix_len()));
            let shift = if hook.is_some_and(|h| h.shifts_positions()) { prefix } else { 0 };
            let before = if past == 0 { virtual_tokens } else { 0 };
            let first = if past == 0 { shift } else { shift + virtual_tokens + past };
            let n = before + sequence.tokens.len();
            if sequence.tokens.is_empty() || first + n > base.info.context {
                let last = first + n;
                candle_core::bail!("a sequence of 0 rows or beyond the context: {last} of {}", base.info.context);
            }
            positions.extend((first..first + n).map(|p| p as u32));
            rows.push(start..start + n);
            virtual_rows.push(before);
            match groups.last_mut().filter(|group| same(&group.hook, &sequence.hook)) {
                Some(group) => {
                    group.rows.end += n;
                    group.sequences.end += 1;
                    group.lengths.push(n);
                }
                None => groups.push(Group {
                    hook: sequence.hook.clone(),
                    rows: start..start + n,
                    sequences: i..i + 1,
                    lengths: vec![n],
                }),
            }
            start += n;
        }
        let (pieces, positions) = (pieces(&groups), Arc::new(positions));
        Ok(Self { groups, pieces, rows, virtual_rows, positions, train: batch.train })
    }

    /// Token embeddings of all rows, with the rows that hooks put there.
    pub fn embed(&self, base: &Base, batch: &Batch) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(batch.sequences.len());
        for (i, sequence) in batch.sequences.iter().enumerate() {
            let mut x = base.embed(sequence.tokens)?;
            if let Some(hook) = &sequence.hook {
                let is_start = sequence.cache.as_ref().is_none_or(|cache| cache.tokens == 0);
                x = hook.embed(sequence.tokens, is_start, x)?;
            }
            if x.dims2()? != (self.rows[i].len(), base.info.hidden) {
                candle_core::bail!("the embed hook gave {:?}, not {} rows", x.shape(), self.rows[i].len());
            }
            parts.push(x);
        }
        join(parts)
    }

    pub fn layer(&self, base: &Base, batch: &mut Batch, layer: usize, x: &Tensor) -> Result<Tensor> {
        let weights = &base.layers[layer];
        let h = ops::rms_norm(x, &weights.attention_norm, base.eps)?;
        let q = self.linear(layer, Site::Q, &h, &weights.q)?;
        let k = self.linear(layer, Site::K, &h, &weights.k)?;
        let v = self.linear(layer, Site::V, &h, &weights.v)?;
        let (k, v) = self.keys(layer, k, v)?;
        let q = match &weights.q_norm {
            Some(norm) => ops::rms_norm(&q, norm, base.eps)?,
            None => q,
        };
        let k = match &weights.k_norm {
            Some(norm) => ops::rms_norm(&k, norm, base.eps)?,
            None => k,
        };
        let q = ops::rope(&q, &base.rope, &self.positions)?;
        let k = ops::rope(&k, &base.rope, &self.positions)?;
        let attended = if batch.sequences[0].cache.is_some() {
            self.attend_cached(base, batch, layer, &h, [&q, &k, &v])?
        } else {
            self.attend(base, layer, &h, [&q, &k, &v])?
        };
        let x = (x + self.linear(layer, Site::O, &attended, &weights.o)?)?;

        let h = ops::rms_norm(&x, &weights.mlp_norm, base.eps)?;
        let only = self.only_active();
        let own = match only {
            Some((group, hook)) => hook.mlp(self.at(layer, group), &h, &weights.mlp)?,
            None => None,
        };
        let m = match own {
            Some(m) => m,
            None => {
                let gate = self.linear(layer, Site::Gate, &h, &weights.mlp.gate)?;
                let up = self.linear(layer, Site::Up, &h, &weights.mlp.up)?;
                let z = weights.mlp.activate(&gate, &up)?;
                let z = self.map(z, |group, hook, z| hook.act(self.at(layer, group), z))?;
                let m = self.linear(layer, Site::Down, &z, &weights.mlp.down)?;
                if only.is_some() { m } else { self.own_mlps(base, layer, &h, m)? }
            }
        };
        let m = self.map(m, |group, hook, m| hook.after(self.at(layer, group), &part(&x, &group.rows)?, m))?;
        &x + m
    }

    /// The hidden rows of tokens, without the virtual ones.
    pub fn token_rows(&self, x: &Tensor) -> Result<Tensor> {
        if self.virtual_rows.iter().all(|n| *n == 0) {
            return Ok(x.clone());
        }
        let kept = self.rows.iter().zip(&self.virtual_rows).flat_map(|(rows, n)| rows.start + n..rows.end);
        let kept: Vec<u32> = kept.map(|row| row as u32).collect();
        x.index_select(&Tensor::new(kept, &Device::Cpu)?, 0)
    }

    /// Notes in the caches what this pass put there.
    pub fn finish(&mut self, batch: &mut Batch) {
        for (sequence, n) in batch.sequences.iter_mut().zip(&self.virtual_rows) {
            if let Some(cache) = &mut sequence.cache {
                cache.virtual_tokens += n;
                cache.tokens += sequence.tokens.len();
            }
        }
    }

    fn at<'a>(&self, layer: usize, group: &'a Group) -> At<'a> {
        At { layer, lengths: &group.lengths, train: self.train }
    }

    /// The hook that has all rows to itself.
    fn only_active(&self) -> Option<(&Group, &dyn Hook)> {
        match self.groups.as_slice() {
            [group] => group.active().map(|hook| (group, hook.as_ref())),
            _ => None,
        }
    }

    /// One frozen product for all rows, whatever their adapters; then each adapter's change on its own rows.
    fn linear(&self, layer: usize, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        if let Some((group, hook)) = self.only_active() {
            return hook.linear(self.at(layer, group), site, x, base);
        }
        let y = self.map(base.forward(x)?, |group, hook, y| {
            hook.adjust(self.at(layer, group), site, &part(x, &group.rows)?, y, base)
        })?;
        let changes = self.groups.iter().filter_map(|group| {
            let change = group.hook.as_ref()?.low_rank()?.get(layer, site)?;
            Some((group.rows.clone(), change))
        });
        let changes: Vec<_> = changes.collect();
        if !changes.is_empty() {
            add_low_rank(x, &y, &changes)?;
        }
        Ok(y)
    }

    /// Applies `f` to the rows of each group that has an active hook.
    fn map(&self, y: Tensor, f: impl Fn(&Group, &dyn Hook, Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let mapped = |piece: &Piece, y: Tensor| match self.active(piece) {
            Some((group, hook)) => f(group, hook, y),
            None => Ok(y),
        };
        match self.pieces.as_slice() {
            [piece] => mapped(piece, y),
            pieces => join(pieces.iter().map(|piece| mapped(piece, part(&y, &piece.rows)?)).collect::<Result<_>>()?),
        }
    }

    fn active(&self, piece: &Piece) -> Option<(&Group, &dyn Hook)> {
        let group = &self.groups[piece.group?];
        group.active().map(|hook| (group, hook.as_ref()))
    }

    fn keys(&self, layer: usize, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let (mut ks, mut vs) = (Vec::new(), Vec::new());
        for piece in &self.pieces {
            let (k, v) = (part(&k, &piece.rows)?, part(&v, &piece.rows)?);
            let (k, v) = match self.active(piece) {
                Some((group, hook)) => hook.kv(self.at(layer, group), k, v)?,
                None => (k, v),
            };
            ks.push(k);
            vs.push(v);
        }
        Ok((join(ks)?, join(vs)?))
    }

    /// Feed-forward blocks that hooks replace in a batch of several adapters: `m` keeps the other rows.
    fn own_mlps(&self, base: &Base, layer: usize, h: &Tensor, m: Tensor) -> Result<Tensor> {
        self.map(m, |group, hook, m| {
            let own = hook.mlp(self.at(layer, group), &part(h, &group.rows)?, &base.layers[layer].mlp)?;
            Ok(own.unwrap_or(m))
        })
    }

    /// Attention while training: prefixes stand before each sequence's keys.
    fn attend(&self, base: &Base, layer: usize, h: &Tensor, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let prefixes = self.prefixes(layer)?;
        if prefixes.iter().all(Option::is_none) {
            let span = |rows: &Range<usize>| Span { queries: rows.clone(), keys: rows.clone(), prefix: 0 };
            let spans = Arc::new(self.rows.iter().map(span).collect());
            return ops::attention(q, k, v, &base.attention, &spans);
        }
        let mut outputs = Vec::new();
        for (group, prefix) in self.groups.iter().zip(&prefixes) {
            let gate = self.gate(layer, group, h)?;
            let (mut ks, mut vs, mut spans, mut end) = (Vec::new(), Vec::new(), Vec::new(), 0);
            for rows in &self.rows[group.sequences.clone()] {
                let p = prefix.as_ref().map_or(Ok(0), |(k, _)| k.dim(0))?;
                if let Some((k, v)) = prefix {
                    ks.push(k.clone());
                    vs.push(v.clone());
                }
                ks.push(part(k, rows)?);
                vs.push(part(v, rows)?);
                let queries = rows.start - group.rows.start..rows.end - group.rows.start;
                spans.push(Span { queries, keys: end..end + p + rows.len(), prefix: p });
                end += p + rows.len();
            }
            let (q, k, v) = (part(q, &group.rows)?, join(ks)?, join(vs)?);
            outputs.push(match gate {
                Some(gate) => gated_attention([&q, &k, &v], &gate, &base.attention, &spans)?,
                None => ops::attention(&q, &k, &v, &base.attention, &Arc::new(spans))?,
            });
        }
        join(outputs)
    }

    /// Attention while serving: the rows join the caches first.
    fn attend_cached(
        &self,
        base: &Base,
        batch: &mut Batch,
        layer: usize,
        h: &Tensor,
        [q, k, v]: [&Tensor; 3],
    ) -> Result<Tensor> {
        let kv = base.attention.kv_heads * base.attention.head_dim;
        let prefixes = self.prefixes(layer)?;
        let mut spans = Vec::with_capacity(self.rows.len());
        for (group, prefix) in self.groups.iter().zip(&prefixes) {
            for i in group.sequences.clone() {
                let Some(cache) = batch.sequences[i].cache.as_deref_mut() else { continue };
                if let Some((k, v)) = prefix.as_ref().filter(|_| cache.tokens == 0) {
                    cache.prefix = k.dim(0)?;
                    append(&mut cache.layers[layer], [k, v], 0..cache.prefix)?;
                }
                append(&mut cache.layers[layer], [k, v], self.rows[i].clone())?;
                let keys = 0..cache.layers[layer].k.len() / kv;
                spans.push(Span { queries: self.rows[i].clone(), keys, prefix: cache.prefix });
            }
        }
        let caches: Vec<&LayerCache> =
            batch.sequences.iter().filter_map(|s| s.cache.as_ref().map(|c| &c.layers[layer])).collect();
        let gates = self.groups.iter().map(|group| self.gate(layer, group, h)).collect::<Result<Vec<_>>>()?;
        if gates.iter().all(Option::is_none) {
            return ops::attend_cached(q, &base.attention, &spans, &caches);
        }
        let mut outputs = Vec::new();
        for (group, gate) in self.groups.iter().zip(gates) {
            for i in group.sequences.clone() {
                let (rows, cache) = (&self.rows[i], caches[i]);
                let q = part(q, rows)?;
                let local = Span { queries: 0..rows.len(), ..spans[i].clone() };
                outputs.push(match &gate {
                    Some(gate) => {
                        let n = local.keys.len();
                        let k = Tensor::from_slice(&cache.k, (n, kv), &Device::Cpu)?;
                        let v = Tensor::from_slice(&cache.v, (n, kv), &Device::Cpu)?;
                        let gate = part(gate, &(rows.start - group.rows.start..rows.end - group.rows.start))?;
                        gated_attention([&q, &k, &v], &gate, &base.attention, &[local])?
                    }
                    None => ops::attend_cached(&q, &base.attention, &[local], &[cache])?,
                });
            }
        }
        join(outputs)
    }

    fn prefixes(&self, layer: usize) -> Result<Vec<Option<(Tensor, Tensor)>>> {
        self.groups.iter().map(|g| g.active().map_or(Ok(None), |hook| hook.prefix(layer))).collect()
    }

    fn gate(&self, layer: usize, group: &Group, h: &Tensor) -> Result<Option<Tensor>> {
        let Some(hook) = group.active() else { return Ok(None) };
        hook.gate(self.at(layer, group), &part(h, &group.rows)?)
    }
}

fn append(cache: &mut LayerCache, kv: [&Tensor; 2], rows: Range<usize>) -> Result<()> {
    let width = kv[0].dim(1)?;
    ops::with([&kv[0].contiguous()?, &kv[1].contiguous()?], |[k, v]| {
        cache.k.extend_from_slice(&k[rows.start * width..rows.end * width]);
        cache.v.extend_from_slice(&v[rows.start * width..rows.end * width]);
        Ok(())
    })
}

/// Some rows; all of them cost nothing.
fn part(x: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    if rows.len() == x.dim(0)? { Ok(x.clone()) } else { x.narrow(0, rows.start, rows.len())?.contiguous() }
}

fn join(mut parts: Vec<Tensor>) -> Result<Tensor> {
    if parts.len() == 1 { Ok(parts.remove(0)) } else { Tensor::cat(&parts, 0) }
}
