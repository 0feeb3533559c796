//! AdaLoRA: triplets beside each chosen linear, of which training keeps those that matter.
//!
//! Between two prunings every triplet is trained, so one that was pruned may come back; the last pruning, `tfinal`
//! steps before the end, settles which stay. Until then the adapter is exported whole, as it computes; from then on,
//! pruned. Continued from its files it keeps the ranks that they have: its budget is spent.

mod config;
mod fold;
mod importance;
mod layer;
mod training;

use std::sync::Arc;

use candle_core::Tensor;

use super::{
    AdapterFiles, Merge, Method, MethodError, Start, Trainable, file,
    lora::layer::{Adapted, LowRank},
    variables,
};
use crate::{
    domain::{AdaLoraSpec, BaseInfo, Site, rng::Stream},
    model::{Base, Hook},
};
use layer::Triplets;
use training::{Ranks, Training};

pub use config::read as spec_of;

/// One linear that is changed.
#[derive(Clone, Copy, Debug)]
struct Module {
    layer: usize,
    site: Site,
    /// How many triplets it has.
    r: usize,
}

impl Module {
    /// Its name in `rank_pattern`.
    fn key(&self) -> String {
        format!("{}.lora_E", self.site.path(self.layer))
    }
}

impl Method for AdaLoraSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let base = &start.base.info;
        let modules = modules(self, base)?;
        let budget = self.budget(start.total_steps).map_err(|error| MethodError::Mismatch(error.to_string()))?;
        let values = modules.iter().flat_map(|module| initial(module, base, start.seed)).collect();
        let tensors = variables::tensors(values, &shapes(&modules, base))?;
        Ok(Box::new(Training::new(self, base, budget, modules, &tensors, Ranks::open)?))
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        let config = file::config(files)?;
        let budget = config::budget(&config, self)?;
        let Stored { modules, kept, tensors } = Stored::read(self, files, &base.info)?;
        Ok(Box::new(Training::new(self, &base.info, budget, modules, &tensors, |_| Ranks::Given(kept))?))
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        let Stored { modules, tensors, .. } = Stored::read(self, files, &base.info)?;
        let triplets: Vec<Triplets> = tensors.chunks_exact(3).map(triplets).collect();
        let change = change(self, &base.info, &modules, &triplets)?;
        Ok(match change.served(base)? {
            Some(served) => Arc::new(served),
            None => Arc::new(change),
        })
    }

    fn as_lora(&self, files: &AdapterFiles, base: &BaseInfo) -> Result<AdapterFiles, MethodError> {
        fold::as_lora(self, files, base)
    }

    fn merge(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Merge>, MethodError> {
        super::merge(&self.as_lora(files, &base.info)?, base)
    }
}

/// What an adapter's files hold.
struct Stored {
    modules: Vec<Module>,
    /// `rank_pattern`, by module.
    kept: Option<Vec<Vec<bool>>>,
    /// A, E and B of each module.
    tensors: Vec<Tensor>,
}

impl Stored {
    fn read(spec: &AdaLoraSpec, files: &AdapterFiles, base: &BaseInfo) -> Result<Self, MethodError> {
        let mut modules = modules(spec, base)?;
        let kept = config::kept(&file::config(files)?, spec, &modules)?;
        for (module, kept) in modules.iter_mut().zip(kept.iter().flatten()) {
            module.r = kept.iter().filter(|kept| **kept).count();
        }
        let tensors = variables::read(&files.weights, &shapes(&modules, base))?;
        Ok(Self { modules, kept, tensors })
    }
}

/// What the spec targets, at its full rank; checked again, because a file's config is from outside.
fn modules(spec: &AdaLoraSpec, base: &BaseInfo) -> Result<Vec<Module>, MethodError> {
    let targets = spec.targets(base).map_err(|error| MethodError::Mismatch(error.to_string()))?;
    if targets.is_empty() {
        return Err(MethodError::Mismatch(format!("target_modules match no module of {}", base.id)));
    }
    for (layer, site) in &targets {
        let (outputs, inputs) = base.shape(*site);
        let (r, limit, path) = (spec.init_r, outputs.min(inputs), site.path(*layer));
        if !(1..=limit).contains(&r) {
            return Err(MethodError::Mismatch(format!("init_r {r} of {path} is outside 1 to {limit}")));
        }
    }
    if !(spec.lora_alpha.is_finite() && spec.lora_alpha > 0.0) {
        return Err(MethodError::Mismatch(format!("lora_alpha {} is not above 0", spec.lora_alpha)));
    }
    Ok(targets.into_iter().map(|(layer, site)| Module { layer, site, r: spec.init_r }).collect())
}

/// PEFT's names and the shapes: A, E and B of each module.
fn shapes(modules: &[Module], base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
    let three = |module: &Module| {
        let (outputs, inputs) = base.shape(module.site);
        let name = |tensor: &str| format!("base_model.model.{}.{tensor}", module.site.path(module.layer));
        [
            (name("lora_A"), vec![module.r, inputs]),
            (name("lora_E"), vec![module.r, 1]),
            (name("lora_B"), vec![outputs, module.r]),
        ]
    };
    modules.iter().flat_map(three).collect()
}

/// A and B normal with deviation 0.02, E zero, so that a fresh adapter is the base itself.
fn initial(module: &Module, base: &BaseInfo, seed: u64) -> [Vec<f32>; 3] {
    let (outputs, inputs) = base.shape(module.site);
    let place = (module.layer * Site::LAYER.len() + module.site as usize) as u64;
    let normal = |stream, n| Stream::new(seed, stream).normals(n).map(|x| 0.02 * x).collect();
    [normal(2 * place, module.r * inputs), vec![0.0; module.r], normal(2 * place + 1, outputs * module.r)]
}

fn triplets(tensors: &[Tensor]) -> Triplets {
    Triplets { a: tensors[0].clone(), e: tensors[1].clone(), b: tensors[2].clone() }
}

/// `alpha / (init_r + 1e-5)`: PEFT divides so, and never by the rank that is left.
fn scale(spec: &AdaLoraSpec) -> f64 {
    spec.lora_alpha / (spec.init_r as f64 + 1e-5)
}

/// `triplets` are those of each module; modules without any change nothing.
fn change(
    spec: &AdaLoraSpec,
    base: &BaseInfo,
    modules: &[Module],
    triplets: &[Triplets],
) -> Result<Adapted<LowRank>, candle_core::Error> {
    let mut change = Adapted::new(base.layers, spec.lora_dropout);
    for (module, triplets) in modules.iter().zip(triplets).filter(|(module, _)| module.r > 0) {
        change.insert(module.layer, module.site, triplets.low_rank(scale(spec))?);
    }
    Ok(change)
}
