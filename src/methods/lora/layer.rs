//! LoRA's arithmetic (Hu et al., arXiv 2106.09685), and where the methods of its family act.
//!
//! `y = base(x) + s · (drop(x) Aᵀ) Bᵀ` with `A: (r, in)`, `B: (out, r)`, `s = alpha/r` (or `alpha/√r`, rsLoRA).
//! Dropout acts on the adapter's input only, for each linear by itself, and only while training.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Result, Tensor};

use crate::{
    domain::{Norm, Site},
    methods::{Merge, dropout, saved::Saved},
    model::{self, At, Base, Hook, Linear, Served, ops},
};

/// What a method makes of one linear. `dropped` is x with dropout, none where nothing is dropped.
pub trait Change: Send + Sync + Sized {
    /// x: (rows, in) → (rows, out), bias included
    fn forward(&self, x: &Tensor, dropped: Option<&Tensor>, base: &Linear) -> Result<Tensor>;

    /// The same where `y = base(x)` is there already.
    fn adjust(&self, x: &Tensor, dropped: Option<&Tensor>, y: Tensor, base: &Linear) -> Result<Tensor>;

    /// The tensors that gradients go to.
    fn parts(&self) -> Vec<Tensor>;

    /// The same change with other parts.
    fn of_parts(&self, parts: &[Tensor]) -> Self;

    /// W with the change in it.
    fn merged(&self, w: &Tensor) -> Result<Tensor>;

    /// The bias with the change in it, none where it stays.
    fn merged_bias(&self, b: &Tensor) -> Result<Option<Tensor>> {
        _ = b;
        Ok(None)
    }
}

/// One linear's change.
#[derive(Clone)]
pub struct LowRank {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
}

impl LowRank {
    /// `s · (x Aᵀ) Bᵀ`
    pub fn delta(&self, x: &Tensor) -> Result<Tensor> {
        ops::low_rank_delta(x, &self.a, &self.b, self.scale as f32)
    }

    /// Of an embedding, whose input is a token: `s · A[:, ids]ᵀ Bᵀ`, with `A: (r, vocab)` and `B: (hidden, r)`.
    fn embedded(&self, ids: &[u32]) -> Result<Tensor> {
        let columns = self.a.index_select(&Tensor::new(ids, &Device::Cpu)?, 1)?;
        columns.t()?.matmul(&self.b.t()?)?.affine(self.scale, 0.0)
    }
}

impl LowRank {
    /// The same beside this linear, to serve.
    pub fn served(&self, linear: &Linear) -> Result<model::LowRank> {
        let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        Ok(linear.low_rank(numbers(&self.a)?, &numbers(&self.b)?, self.scale))
    }
}

impl Adapted<LowRank> {
    /// The same in ops over all adapters of a batch; none where more is changed than linears of the layers.
    pub fn served(&self, base: &Base) -> Result<Option<Served>> {
        if self.head.is_some() || self.embed.is_some() || !self.saved.is_empty() {
            return Ok(None);
        }
        let mut served = Served::new(self.layers.len());
        for (layer, sites) in self.layers.iter().enumerate() {
            for (site, change) in Site::LAYER.into_iter().zip(sites) {
                if let Some(change) = change {
                    served.insert(layer, site, change.served(base.linear(layer, site))?);
                }
            }
        }
        Ok(Some(served))
    }
}

impl Change for LowRank {
    fn forward(&self, x: &Tensor, dropped: Option<&Tensor>, base: &Linear) -> Result<Tensor> {
        match dropped {
            None => base.forward_low_rank(x, &self.a, &self.b, self.scale),
            Some(dropped) => ops::add(&base.forward(x)?, &self.delta(dropped)?),
        }
    }

    fn adjust(&self, x: &Tensor, dropped: Option<&Tensor>, y: Tensor, _: &Linear) -> Result<Tensor> {
        ops::add(&y, &self.delta(dropped.unwrap_or(x))?)
    }

    fn parts(&self) -> Vec<Tensor> {
        vec![self.a.clone(), self.b.clone()]
    }

    fn of_parts(&self, parts: &[Tensor]) -> Self {
        Self { a: parts[0].clone(), b: parts[1].clone(), scale: self.scale }
    }

    fn merged(&self, w: &Tensor) -> Result<Tensor> {
        w + self.b.matmul(&self.a)?.affine(self.scale, 0.0)?
    }
}

/// The adapter as the model sees it. While training, its tensors share their memory with the variables.
pub struct Adapted<C> {
    /// `[layer][site]`
    layers: Vec<[Option<C>; Site::LAYER.len()]>,
    head: Option<C>,
    /// Takes no dropout: a token cannot be scaled.
    embed: Option<LowRank>,
    saved: Saved,
    dropout: f64,
    /// The key of the pass that this hook is for.
    train: Option<u64>,
    /// How often the output layer was asked: each time other rows, which take another mask.
    heads: AtomicU64,
}

impl<C: Change> Adapted<C> {
    pub fn new(layers: usize, dropout: f64) -> Self {
        let layers = (0..layers).map(|_| Default::default()).collect();
        let (saved, heads) = (Saved::default(), AtomicU64::new(0));
        Self { layers, head: None, embed: None, saved, dropout, train: None, heads }
    }

    /// For the pass of a key, with the parts of the base that are trained as they are.
    pub fn of_pass(self, train: Option<u64>, saved: Saved) -> Self {
        Self { train, saved, ..self }
    }

    pub fn insert(&mut self, layer: usize, site: Site, change: C) {
        if site == Site::Head {
            self.head = Some(change);
        } else if let Some(slot) = self.layers.get_mut(layer).and_then(|sites| sites.get_mut(site as usize)) {
            *slot = Some(change);
        }
    }

    pub fn insert_embed(&mut self, change: LowRank) {
        self.embed = Some(change);
    }

    fn get(&self, at: At, site: Site) -> Option<&C> {
        self.layers.get(at.layer)?.get(site as usize)?.as_ref()
    }

    /// The change of a module by its path.
    fn at_path(&self, path: &str) -> Option<&C> {
        if path == Site::Head.module() {
            return self.head.as_ref();
        }
        let mut all = self.layers.iter().enumerate().flat_map(|(layer, sites)| {
            Site::LAYER.iter().zip(sites).map(move |(site, change)| (site.path(layer), change))
        });
        all.find(|(found, _)| found == path).and_then(|(_, change)| change.as_ref())
    }

    /// x with dropout; none where there is nothing to drop.
    fn dropped(&self, at: At, site: Site, x: &Tensor) -> Result<Option<Tensor>> {
        dropout(x, self.dropout, at.train, (at.layer * Site::LAYER.len() + site as usize) as u64)
    }
}

impl<C: Change> Hook for Adapted<C> {
    fn embed(&self, ids: &[u32], _: bool, x: Tensor) -> Result<Tensor> {
        match &self.embed {
            Some(change) => x + change.embedded(ids)?,
            None => self.saved.embed(ids, x),
        }
    }

    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        match self.get(at, site) {
            Some(change) => change.forward(x, self.dropped(at, site, x)?.as_ref(), base),
            None => base.forward(x),
        }
    }

    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, base: &Linear) -> Result<Tensor> {
        match self.get(at, site) {
            Some(change) => change.adjust(x, self.dropped(at, site, x)?.as_ref(), y, base),
            None => Ok(y),
        }
    }

    fn norm(&self, place: Norm) -> Option<Tensor> {
        self.saved.norm(place)
    }

    fn head_parts(&self) -> Vec<Tensor> {
        self.head.as_ref().map_or_else(|| self.saved.head_parts(), Change::parts)
    }

    fn head_of(&self, parts: &[Tensor], x: &Tensor, base: &Linear) -> Result<Tensor> {
        match (&self.head, parts) {
            (Some(change), _) => {
                // Behind the places of the layers, by chunks.
                let place = (self.layers.len() * Site::LAYER.len()) as u64 + self.heads.fetch_add(1, Ordering::Relaxed);
                let dropped = dropout(x, self.dropout, self.train, place)?;
                change.of_parts(parts).forward(x, dropped.as_ref(), base)
            }
            (None, [part]) => self.saved.head_of(part, x, base),
            (None, _) => base.forward(x),
        }
    }
}

impl<C: Change> Merge for Adapted<C> {
    fn tensor(&self, name: &str, weight: &Tensor) -> Result<Option<Tensor>> {
        let Some((path, kind)) = name.rsplit_once('.') else { return Ok(None) };
        if let Some(change) = self.at_path(path) {
            return if kind == "bias" { change.merged_bias(weight) } else { change.merged(weight).map(Some) };
        }
        if let Some(change) = self.embed.as_ref().filter(|_| path == Site::Embed.module()) {
            return (weight + change.b.matmul(&change.a)?.t()?.affine(change.scale, 0.0)?).map(Some);
        }
        self.saved.merged(path, weight)
    }
}
