//! One forward pass through the decoder: which rows belong to whom, and where the hooks are called.

use std::{ops::Range, sync::Arc};

use candle_core::{Device, Result, Tensor};

use super::{
    At, Base, Batch, Finish, Hook, Linear, Replaced, Taken,
    mlp::{Mlp, Products},
    ops::{self, Block, Rotation, Span},
    served::{Crowd, Served},
};
use crate::domain::{Norm, Site};

/// Keys and values that a hook puts before the text.
pub(super) type Prefix = (Tensor, Tensor);

/// Neighbouring sequences with one adapter.
struct Group {
    hook: Option<Arc<dyn Hook>>,
    rows: Range<usize>,
    sequences: Range<usize>,
    /// Rows of each sequence.
    lengths: Vec<usize>,
}

impl Group {
    /// What is done for all adapters of a batch at once.
    fn served(&self) -> Option<&Served> {
        self.hook.as_ref()?.served()
    }

    /// The hook that has to be called inside the layers.
    fn active(&self) -> Option<&Arc<dyn Hook>> {
        self.hook.as_ref().filter(|hook| hook.served().is_none())
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
    /// Where the branches of each sequence are among all rows.
    branches: Vec<Vec<Range<usize>>>,
    /// Of each of the base's ropes.
    rotations: Vec<Arc<Rotation>>,
    train: Option<u64>,
}

pub(super) fn same(a: &Option<Arc<dyn Hook>>, b: &Option<Arc<dyn Hook>>) -> bool {
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
        let (mut groups, mut rows, mut virtual_rows, mut branches) = (Vec::<Group>::new(), vec![], vec![], vec![]);
        let (mut positions, mut start) = (Vec::new(), 0);
        for (i, sequence) in batch.sequences.iter().enumerate() {
            let hook = sequence.hook.as_deref();
            let past = sequence.cache.as_ref().map_or(0, |cache| cache.len());
            let (virtual_tokens, places) = hook.map_or((0, 0), |h| (h.virtual_tokens(), h.places()));
            let before = if past == 0 { virtual_tokens } else { 0 };
            let first = places + past - before;
            let n = before + sequence.tokens.len();
            if let Some(short) =
                base.info.short_context.filter(|short| past > 0 && first <= *short && first + n > *short)
            {
                candle_core::bail!("a sequence that began within {short} positions cannot go on behind them");
            }
            let of_branches: usize = sequence.branches.iter().sum();
            let can_branch = sequence.cache.is_none() && base.info.short_context.is_none() && of_branches < n;
            if of_branches > 0 && !can_branch {
                candle_core::bail!("a sequence of {n} rows cannot have branches of {of_branches}");
            }
            let stem = n - of_branches;
            let last = first + stem + sequence.branches.iter().max().unwrap_or(&0);
            if sequence.tokens.is_empty() || last > base.info.context {
                candle_core::bail!("a sequence of 0 rows or beyond the context: {last} of {}", base.info.context);
            }
            positions.push((first, stem));
            positions.extend(sequence.branches.iter().map(|n| (first + stem, *n)));
            let ends = sequence.branches.iter().scan(start + stem, |end, n| {
                *end += n;
                Some(*end - n..*end)
            });
            branches.push(ends.collect());
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
        let rotations = base.ropes.iter().map(|rope| Arc::new(rope.rotation(&positions))).collect();
        Ok(Self { pieces: pieces(&groups), groups, rows, virtual_rows, branches, rotations, train: batch.train })
    }

    /// Makes room in the caches for this pass's rows.
    pub fn reserve(&self, batch: &mut Batch) -> Result<()> {
        for (sequence, rows) in batch.sequences.iter_mut().zip(&self.rows) {
            if let Some(cache) = &mut sequence.cache {
                cache.reserve(rows.len())?;
            }
        }
        Ok(())
    }

    /// Token embeddings of all rows, with the rows that hooks put there.
    pub fn embed(&self, base: &Base, batch: &Batch) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(batch.sequences.len());
        for (i, sequence) in batch.sequences.iter().enumerate() {
            let mut x = base.embed(sequence.tokens)?;
            if let Some(hook) = &sequence.hook {
                let is_start = sequence.cache.as_ref().is_none_or(|cache| cache.is_empty());
                x = hook.embed(sequence.tokens, is_start, x)?;
            }
            if x.dims2()? != (self.rows[i].len(), base.info.hidden) {
                candle_core::bail!("the embed hook gave {:?}, not {} rows", x.shape(), self.rows[i].len());
            }
            parts.push(x);
        }
        join(parts)?.to_device(base.device())
    }

    /// What hooks take from inside the layers.
    pub fn taken(&self) -> impl Iterator<Item = &Taken> {
        self.groups.iter().filter_map(|group| group.hook.as_ref()?.taken())
    }

    /// `prefixes` are the groups', in order. The batch is asked for caches only.
    pub fn layer(
        &self,
        base: &Base,
        batch: &mut Batch,
        layer: usize,
        x: &Tensor,
        prefixes: &[Option<Prefix>],
    ) -> Result<Tensor> {
        let weights = &base.layers[layer];
        let h = self.norm(Norm::Attention(layer), x, &weights.attention_norm, base.eps)?;
        let q = self.linear(layer, Site::Q, &h, &weights.q)?;
        let k = self.linear(layer, Site::K, &h, &weights.k)?;
        let v = self.linear(layer, Site::V, &h, &weights.v)?;
        let (k, v) = self.keys(layer, k, v)?;
        let q = self.head_norm(Norm::Query(layer), q, &weights.q_norm, base.eps)?;
        let k = self.head_norm(Norm::Key(layer), k, &weights.k_norm, base.eps)?;
        let rotation = &self.rotations[weights.rope];
        let (q, k) = (ops::rope(&q, rotation)?, ops::rope(&k, rotation)?);
        let attended = if batch.sequences.first().is_some_and(|sequence| sequence.cache.is_some()) {
            self.attend_cached(base, batch, (layer, prefixes), &h, [&q, &k, &v])?
        } else {
            self.attend(base, (layer, prefixes), &h, [&q, &k, &v])?
        };
        let attended = self.linear(layer, Site::O, &attended, &weights.o)?;
        let x = ops::add(x, &normed(attended, &weights.attention_out_norm, base.eps)?)?;

        let h = self.norm(Norm::Mlp(layer), &x, &weights.mlp_norm, base.eps)?;
        let gate = self.linear(layer, Site::Gate, &h, &weights.mlp.gate)?;
        let up = self.linear(layer, Site::Up, &h, &weights.mlp.up)?;
        let z = weights.mlp.activate(&gate, &up)?;
        let z = self.crowd().product(layer, z)?;
        let z = self.map(z, |group, hook, z| hook.act(self.at(layer, group), z))?;
        let products = Products { gate, up, z };
        let extra = self.crowd().mix(layer, &weights.mlp, &h, &products)?;
        let (z, finishes) = self.replaced(layer, &weights.mlp, &h, products)?;
        let m = self.linear(layer, Site::Down, &z, &weights.mlp.down)?;
        let m = self.crowd().mixed(layer, self.finished(m, finishes)?, extra)?;
        let m = normed(m, &weights.mlp_out_norm, base.eps)?;
        let m = self.crowd().after(layer, &x, m)?;
        let m = self.map(m, |group, hook, m| hook.after(self.at(layer, group), &part(&x, &group.rows)?, m))?;
        ops::add(&x, &m)
    }

    /// The hidden rows of tokens, without the virtual ones.
    pub fn token_rows(&self, x: &Tensor) -> Result<Tensor> {
        if self.virtual_rows.iter().all(|n| *n == 0) {
            return Ok(x.clone());
        }
        let kept = self.rows.iter().zip(&self.virtual_rows).flat_map(|(rows, n)| rows.start + n..rows.end);
        let kept: Vec<u32> = kept.map(|row| row as u32).collect();
        x.index_select(&Tensor::new(kept, x.device())?, 0)
    }

    /// Notes in the caches what this pass put there.
    pub fn finish(&mut self, batch: &mut Batch) {
        for (sequence, n) in batch.sequences.iter_mut().zip(&self.virtual_rows) {
            if let Some(cache) = &mut sequence.cache {
                cache.finish(*n, sequence.tokens.len());
            }
        }
    }

    fn at<'a>(&self, layer: usize, group: &'a Group) -> At<'a> {
        At { layer, lengths: &group.lengths, train: self.train }
    }

    /// A norm of each head, where there is one.
    fn head_norm(&self, place: Norm, x: Tensor, weight: &Option<Arc<Vec<f32>>>, eps: f32) -> Result<Tensor> {
        match weight {
            Some(weight) => self.norm(place, &x, weight, eps),
            None => Ok(x),
        }
    }

    /// A norm over groups of its weights' length, with the weights that each row's adapter has for it.
    pub fn norm(&self, place: Norm, x: &Tensor, weight: &Arc<Vec<f32>>, eps: f32) -> Result<Tensor> {
        let own: Vec<Option<Tensor>> =
            self.groups.iter().map(|group| group.hook.as_ref().and_then(|hook| hook.norm(place))).collect();
        if own.iter().all(Option::is_none) {
            return ops::rms_norm(x, weight, eps);
        }
        let parts = self.groups.iter().zip(own).map(|(group, own)| {
            let x = part(x, &group.rows)?;
            let Some(own) = own else { return ops::rms_norm(&x, weight, eps) };
            let plain = ops::rms_norm(&x, &Arc::new(vec![1.0; weight.len()]), eps)?.reshape(((), weight.len()))?;
            ops::rescale(&plain, &own, None)?.reshape(x.shape())
        });
        join(parts.collect::<Result<_>>()?)
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
        self.crowd().linear(layer, site, x, y)
    }

    fn crowd(&self) -> Crowd<'_> {
        self.groups.iter().filter_map(|group| Some((group.rows.clone(), group.served()?))).collect()
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

    /// What `down` takes of all rows, and what hooks make of its product, piece by piece.
    fn replaced(
        &self,
        layer: usize,
        mlp: &Mlp,
        h: &Tensor,
        all: Products,
    ) -> Result<(Tensor, Vec<Option<Finish<'_>>>)> {
        let (mut zs, mut finishes) = (Vec::with_capacity(self.pieces.len()), Vec::with_capacity(self.pieces.len()));
        for piece in &self.pieces {
            let replaced = match self.active(piece) {
                Some((group, hook)) => {
                    let of = |x: &Tensor| part(x, &piece.rows);
                    let products = Products { gate: of(&all.gate)?, up: of(&all.up)?, z: of(&all.z)? };
                    hook.mlp(self.at(layer, group), &of(h)?, &products, mlp)?
                }
                None => None,
            };
            let (z, finish) = replaced.map(|Replaced { z, finish }| (z, finish)).unzip();
            zs.push(z);
            finishes.push(finish);
        }
        if zs.iter().all(Option::is_none) {
            return Ok((all.z, finishes));
        }
        let parts = zs.into_iter().zip(&self.pieces).map(|(z, piece)| z.map_or_else(|| part(&all.z, &piece.rows), Ok));
        Ok((join(parts.collect::<Result<_>>()?)?, finishes))
    }

    fn finished(&self, m: Tensor, finishes: Vec<Option<Finish>>) -> Result<Tensor> {
        if finishes.iter().all(Option::is_none) {
            return Ok(m);
        }
        let parts = finishes.into_iter().zip(&self.pieces).map(|(finish, piece)| {
            let m = part(&m, &piece.rows)?;
            match finish {
                Some(finish) => finish(m),
                None => Ok(m),
            }
        });
        join(parts.collect::<Result<_>>()?)
    }

    /// Attention while training: prefixes stand before each sequence's keys.
    fn attend(
        &self,
        base: &Base,
        (layer, prefixes): (usize, &[Option<Prefix>]),
        h: &Tensor,
        [q, k, v]: [&Tensor; 3],
    ) -> Result<Tensor> {
        let shape = &base.layers[layer].attention;
        if prefixes.iter().all(Option::is_none) {
            let spans = (0..self.rows.len()).flat_map(|i| self.spans(i, 0, self.rows[i].start, 0));
            return ops::attention(q, k, v, shape, &Arc::new(spans.collect()));
        }
        let mut outputs = Vec::new();
        for (group, prefix) in self.groups.iter().zip(prefixes) {
            let gate = self.gate(layer, group, h)?;
            let (mut ks, mut vs, mut spans, mut end) = (Vec::new(), Vec::new(), Vec::new(), 0);
            for (i, rows) in group.sequences.clone().map(|i| (i, &self.rows[i])) {
                let p = prefix.as_ref().map_or(Ok(0), |(k, _)| k.dim(0))?;
                if let Some((k, v)) = prefix {
                    ks.push(k.to_device(q.device())?);
                    vs.push(v.to_device(q.device())?);
                }
                ks.push(part(k, rows)?);
                vs.push(part(v, rows)?);
                spans.extend(self.spans(i, group.rows.start, end, p));
                end += p + rows.len();
            }
            let (q, k, v) = (part(q, &group.rows)?, join(ks)?, join(vs)?);
            outputs.push(match gate {
                Some(gate) => ops::composed::attention([&q, &k, &v], Some(&gate), shape, &spans)?,
                None => ops::attention(&q, &k, &v, shape, &Arc::new(spans))?,
            });
        }
        join(outputs)
    }

    /// The spans of a sequence: its start, or all of it, and its branches. Queries are counted from the row `first`;
    /// its keys begin at `keys`, `prefix` of them before the text.
    fn spans(&self, i: usize, first: usize, keys: usize, prefix: usize) -> Vec<Span> {
        let (rows, branches) = (&self.rows[i], &self.branches[i]);
        let stem = rows.start..branches.first().map_or(rows.end, |branch| branch.start);
        let queries = |rows: &Range<usize>| rows.start - first..rows.end - first;
        let place = |row: usize| keys + prefix + row - rows.start;
        let start = keys..place(stem.end);
        let branch = |rows: &Range<usize>| {
            let own = place(rows.start)..place(rows.end);
            Span { queries: queries(rows), start: start.clone(), keys: own, prefix }
        };
        let whole = Span { queries: queries(&stem), start: 0..0, keys: start.clone(), prefix };
        std::iter::once(whole).chain(branches.iter().map(branch)).collect()
    }

    /// Attention while serving: the rows join the caches first.
    fn attend_cached(
        &self,
        base: &Base,
        batch: &mut Batch,
        (layer, prefixes): (usize, &[Option<Prefix>]),
        h: &Tensor,
        [q, k, v]: [&Tensor; 3],
    ) -> Result<Tensor> {
        let shape = &base.layers[layer].attention;
        let kv = shape.kv_heads * shape.head_dim;
        ops::with([&host(k)?, &host(v)?], |[k, v]| {
            for (sequence, rows) in batch.sequences.iter_mut().zip(&self.rows) {
                let place = rows.start * kv..rows.end * kv;
                if let Some(cache) = &mut sequence.cache {
                    cache.write(layer, &k[place.clone()], &v[place])?;
                }
            }
            Ok(())
        })?;
        // A prefix is the adapter's own tensors: no sequence has a copy.
        let prefixes: Vec<Option<Prefix>> = (prefixes.iter())
            .map(|prefix| prefix.as_ref().map(|(k, v)| Ok((host(k)?, host(v)?))).transpose())
            .collect::<Result<_>>()?;
        let numbers: Vec<_> =
            prefixes.iter().map(|prefix| prefix.as_ref().map(|(k, v)| [ops::numbers(k), ops::numbers(v)])).collect();
        let (mut spans, mut blocks) = (Vec::with_capacity(self.rows.len()), Vec::with_capacity(self.rows.len()));
        for (group, numbers) in self.groups.iter().zip(&numbers) {
            let prefix = match numbers {
                Some([k, v]) => Some(Block { k: k.slice()?, v: v.slice()?, rows: k.slice()?.len() / kv }),
                None => None,
            };
            for i in group.sequences.clone() {
                let (Some(cache), rows) = (&batch.sequences[i].cache, self.rows[i].clone()) else { continue };
                let seen: Vec<Block> = prefix.into_iter().chain(cache.blocks(layer, rows.len())).collect();
                let keys = 0..seen.iter().map(|block| block.rows).sum();
                spans.push(Span { queries: rows, start: 0..0, keys, prefix: prefix.map_or(0, |prefix| prefix.rows) });
                blocks.push(seen);
            }
        }
        ops::attend_cached(q, shape, &spans, &blocks, self.gates(layer, h)?.as_deref())
    }

    /// Of each row, what its prefix's keys and values count; none where no adapter has gates.
    fn gates(&self, layer: usize, h: &Tensor) -> Result<Option<Vec<f32>>> {
        let mut gates: Option<Vec<f32>> = None;
        for group in &self.groups {
            if let Some(gate) = self.gate(layer, group, h)? {
                let gate = gate.flatten_all()?.to_vec1::<f32>()?;
                gates.get_or_insert_with(|| vec![1.0; h.dims()[0]])[group.rows.clone()].copy_from_slice(&gate);
            }
        }
        Ok(gates)
    }

    pub fn prefixes(&self, layer: usize) -> Result<Vec<Option<Prefix>>> {
        self.groups.iter().map(|g| g.hook.as_ref().map_or(Ok(None), |hook| hook.prefix(layer))).collect()
    }

    fn gate(&self, layer: usize, group: &Group, h: &Tensor) -> Result<Option<Tensor>> {
        let rows = || part(h, &group.rows);
        match (group.served(), group.active()) {
            (Some(served), _) => served.gate(layer).map(|gate| gate.column(&rows()?)).transpose(),
            (None, Some(hook)) => hook.gate(self.at(layer, group), &rows()?),
            (None, None) => Ok(None),
        }
    }
}

/// Through a norm, where there is one.
fn normed(x: Tensor, norm: &Option<Arc<Vec<f32>>>, eps: f32) -> Result<Tensor> {
    match norm {
        Some(norm) => ops::rms_norm(&x, norm, eps),
        None => Ok(x),
    }
}

/// In the host's memory, row by row.
fn host(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.to_device(&Device::Cpu)
}

/// Some rows; all of them cost nothing.
fn part(x: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    if rows.len() == x.dim(0)? { Ok(x.clone()) } else { x.narrow(0, rows.start, rows.len())?.contiguous() }
}

fn join(mut parts: Vec<Tensor>) -> Result<Tensor> {
    if parts.len() == 1 { Ok(parts.remove(0)) } else { Tensor::cat(&parts, 0) }
}
