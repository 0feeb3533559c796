//! (IA)³'s arithmetic (Liu et al., arXiv 2205.05638; PEFT's `tuners/ia3/layer.py`).
//!
//! `y = l ⊙ (x Wᵀ + b)` with `l: (1, out)`, or `y = (l ⊙ x) Wᵀ + b` with `l: (1, in)` for feed-forward targets. Keys
//! are scaled before RoPE.

use candle_core::{Result, Tensor};

use crate::{
    domain::Site,
    methods::{
        Merge,
        lora::layer::{Adapted, Change},
    },
    model::{At, Hook, Linear, ops},
};

/// One linear's factors, a row.
pub enum Factors {
    Output(Tensor),
    Input(Tensor),
}

impl Change for Factors {
    fn forward(&self, x: &Tensor, _: Option<&Tensor>, base: &Linear) -> Result<Tensor> {
        match self {
            Factors::Output(l) => ops::rescale(&base.forward(x)?, &l.flatten_all()?, None),
            Factors::Input(l) => base.forward(&ops::scale(x, &l.flatten_all()?)?),
        }
    }

    fn adjust(&self, x: &Tensor, dropped: Option<&Tensor>, y: Tensor, base: &Linear) -> Result<Tensor> {
        match self {
            Factors::Output(l) => ops::rescale(&y, &l.flatten_all()?, None),
            // The frozen product of the whole batch is no use to these rows.
            Factors::Input(_) => self.forward(x, dropped, base),
        }
    }

    fn parts(&self) -> Vec<Tensor> {
        let (Factors::Output(l) | Factors::Input(l)) = self;
        vec![l.clone()]
    }

    fn of_parts(&self, parts: &[Tensor]) -> Self {
        match self {
            Factors::Output(_) => Factors::Output(parts[0].clone()),
            Factors::Input(_) => Factors::Input(parts[0].clone()),
        }
    }

    fn merged(&self, w: &Tensor) -> Result<Tensor> {
        match self {
            Factors::Output(l) => w.broadcast_mul(&l.t()?),
            Factors::Input(l) => w.broadcast_mul(l),
        }
    }

    fn merged_bias(&self, b: &Tensor) -> Result<Option<Tensor>> {
        match self {
            Factors::Output(l) => (b * l.flatten_all()?).map(Some),
            Factors::Input(_) => Ok(None),
        }
    }
}

/// The adapter as the model sees it.
pub struct Ia3 {
    linears: Adapted<Factors>,
    /// By layer: the inputs of `down` are scaled where they are made, so that no product is made twice.
    down: Vec<Option<Tensor>>,
}

impl Ia3 {
    pub fn new(layers: usize) -> Self {
        Self { linears: Adapted::new(layers, 0.0), down: vec![None; layers] }
    }

    pub fn insert(&mut self, layer: usize, site: Site, factors: Factors) {
        match (factors, site) {
            (Factors::Input(l), Site::Down) => self.down[layer] = Some(l),
            (factors, site) => self.linears.insert(layer, site, factors),
        }
    }
}

impl Hook for Ia3 {
    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        self.linears.linear(at, site, x, base)
    }

    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, base: &Linear) -> Result<Tensor> {
        self.linears.adjust(at, site, x, y, base)
    }

    fn act(&self, at: At, z: Tensor) -> Result<Tensor> {
        match &self.down[at.layer] {
            Some(l) => ops::scale(&z, &l.flatten_all()?),
            None => Ok(z),
        }
    }
}

impl Merge for Ia3 {
    fn tensor(&self, name: &str, weight: &Tensor) -> Result<Option<Tensor>> {
        let of = |layer: usize| format!("{}.weight", Site::Down.path(layer));
        match self.down.iter().enumerate().find(|(layer, _)| of(*layer) == name) {
            Some((_, Some(l))) => weight.broadcast_mul(l).map(Some),
            _ => self.linears.tensor(name, weight),
        }
    }
}
