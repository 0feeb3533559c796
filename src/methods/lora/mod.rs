//! Low-rank adaptation: two small matrices beside each chosen module.

pub(super) mod config;
pub(super) mod gguf;
pub(super) mod init;
pub(super) mod layer;
mod pissa;
mod svd;

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::{
    AdapterFiles, Merge, Method, MethodError, Start, Trainable, file,
    saved::{self, Choice},
};
use crate::{
    domain::{
        BaseInfo, DoraSpec, LoraSpec, MethodSpec, Site,
        spec::{LoraTarget, SavedModule},
    },
    model::{Base, Hook, Served},
};
use layer::{Adapted, LowRank};

/// LoRA's spec or DoRA's, whose files differ in one key.
pub fn spec_of(config: &Map<String, Value>, files: &AdapterFiles) -> Result<MethodSpec, MethodError> {
    let mut spec = config::read(config)?;
    if let Some(names) = &spec.modules_to_save {
        spec.modules_to_save = Some(saved_in(files, names)?);
    }
    Ok(match file::field(config, "use_dora")? {
        Some(true) => MethodSpec::Dora(DoraSpec(spec)),
        _ => MethodSpec::Lora(spec),
    })
}

/// The paths of the modules that the file really saves: PEFT matches names by their end, so that `norm` may stand for
/// one module or for all norms, and only the tensors tell.
fn saved_in(files: &AdapterFiles, names: &[String]) -> Result<Vec<String>, MethodError> {
    let shapes = file::shapes(&files.weights)?;
    let path = |tensor: &str| Some(tensor.strip_prefix("base_model.model.")?.strip_suffix(".weight")?.to_owned());
    let is_named = |path: &String| names.iter().any(|name| path.ends_with(name.as_str()));
    let is_part = |path: &String| path.ends_with("base_layer") || path.contains(".lora_");
    let paths: Vec<String> =
        shapes.iter().filter_map(|(name, _)| path(name)).filter(|path| is_named(path) && !is_part(path)).collect();
    match names.iter().find(|name| !paths.iter().any(|path| path.ends_with(name.as_str()))) {
        None => Ok(paths),
        Some(name) => Err(MethodError::Mismatch(format!("modules_to_save names {name}, which the file does not hold"))),
    }
}

/// Everything of a spec that its tensors go to.
pub(super) struct Places {
    pub targets: Vec<LoraTarget>,
    pub saved: Choice,
}

impl Places {
    pub fn new(spec: &LoraSpec, base: &BaseInfo) -> Result<Self, MethodError> {
        Ok(Self { targets: targets(spec, base)?, saved: Choice::of(spec, base)? })
    }

    /// A and B of each target, then what is saved.
    fn names(&self, base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
        names(&self.targets, base).into_iter().chain(self.saved.names(base)).collect()
    }

    /// Whether only linears of the layers are changed.
    fn are_linears(&self) -> bool {
        self.saved.is_empty() && self.targets.iter().all(|target| Site::LAYER.contains(&target.site))
    }

    fn hook(&self, spec: &LoraSpec, base: &BaseInfo, tensors: &[Tensor], train: Option<u64>) -> Adapted<LowRank> {
        let (pairs, saved) = tensors.split_at(2 * self.targets.len());
        let mut hook = Adapted::new(base.layers, spec.lora_dropout).of_pass(train, self.saved.saved(saved));
        for (target, pair) in self.targets.iter().zip(pairs.chunks_exact(2)) {
            let change = LowRank { a: pair[0].clone(), b: pair[1].clone(), scale: target.scale };
            match target.site {
                Site::Embed => hook.insert_embed(change),
                site => hook.insert(target.layer, site, change),
            }
        }
        hook
    }
}

/// LoRA while it is trained.
struct Training {
    spec: LoraSpec,
    base: BaseInfo,
    places: Places,
    variables: Vec<(String, Var)>,
}

impl Method for LoraSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let base = &start.base.info;
        let places = Places::new(self, base)?;
        if self.is_pissa() {
            return pissa::create(self, places, start);
        }
        let pairs = places.targets.iter().flat_map(|target| {
            let (a, b) = init::values(&self.init_lora_weights, target, base, start.seed);
            [a, b]
        });
        let values = pairs.chain(places.saved.values(start.base)?).collect();
        train(self, base, places, values)
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        let places = Places::new(self, &base.info)?;
        let values = read(files, places.names(&base.info), base)?;
        train(self, &base.info, places, values)
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        let Some(linears) = linears(self, files, base)? else {
            return Ok(Arc::new(adapted(self, files, base)?));
        };
        // Nothing but linears of the layers: the engine makes the changes of all adapters of a batch in one op.
        let change = |(target, a, b): Factors| {
            let linear = base.linear(target.layer, target.site);
            (target.layer, target.site, linear.low_rank(a, &b, target.scale))
        };
        let mut changes = Served::new(base.info.layers);
        for (layer, site, change) in linears.into_par_iter().map(change).collect::<Vec<_>>() {
            changes.insert(layer, site, change);
        }
        Ok(Arc::new(changes))
    }

    fn as_lora(&self, files: &AdapterFiles, _base: &BaseInfo) -> Result<AdapterFiles, MethodError> {
        Ok(files.clone())
    }

    fn merge(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Merge>, MethodError> {
        Ok(Box::new(adapted(self, files, base)?))
    }
}

/// A target with its A and B.
pub(super) type Factors = (LoraTarget, Vec<f32>, Vec<f32>);

/// The changes of linears of the layers, with their factors; none where the adapter changes anything else.
pub(super) fn linears(spec: &LoraSpec, files: &AdapterFiles, base: &Base) -> Result<Option<Vec<Factors>>, MethodError> {
    let places = Places::new(spec, &base.info)?;
    if !places.are_linears() {
        return Ok(None);
    }
    let mut values = read(files, places.names(&base.info), base)?.into_iter();
    let pairs = std::iter::from_fn(|| values.next().zip(values.next()));
    Ok(Some(places.targets.into_iter().zip(pairs).map(|(target, (a, b))| (target, a, b)).collect()))
}

fn adapted(spec: &LoraSpec, files: &AdapterFiles, base: &Base) -> Result<Adapted<LowRank>, MethodError> {
    let places = Places::new(spec, &base.info)?;
    let tensors = tensors(files, places.names(&base.info), base)?;
    Ok(places.hook(spec, &base.info, &tensors, None))
}

/// A file's values, in the order of the names. PEFT also writes the frozen weights of an embedding or output layer
/// that it adapts; they are left aside when they are the base's, up to its quantisation.
pub(super) fn read(
    files: &AdapterFiles,
    mut names: Vec<(String, Vec<usize>)>,
    base: &Base,
) -> Result<Vec<Vec<f32>>, MethodError> {
    let there = file::shapes(&files.weights)?;
    let adapts = |site: Site| {
        let prefix = format!("base_model.model.{}.lora_", site.module());
        names.iter().any(|(name, _)| name.starts_with(&prefix))
    };
    let copies: Vec<(SavedModule, String)> = [(Site::Embed, SavedModule::Embed), (Site::Head, SavedModule::Head)]
        .into_iter()
        .map(|(site, module)| (site, module, format!("base_model.model.{}.base_layer.weight", site.module())))
        .filter(|(site, _, name)| adapts(*site) && there.iter().any(|(found, _)| found == name))
        .map(|(_, module, name)| (module, name))
        .collect();
    let own = names.len();
    names.extend(copies.iter().map(|(module, name)| (name.clone(), module.shape(&base.info))));
    let mut values = file::tensors(&files.weights, &names)?;
    for ((module, name), found) in copies.iter().zip(values.split_off(own)) {
        let expected = saved::of_base(*module, base)?;
        let square = |x: f64| x * x;
        let apart: f64 = found.iter().zip(&expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
        if apart > 0.05 * expected.iter().map(|x| square(f64::from(*x))).sum::<f64>() {
            return Err(MethodError::Mismatch(format!("tensor {name} is not that of {}", base.info.id)));
        }
    }
    Ok(values)
}

/// The same as tensors.
pub(super) fn tensors(
    files: &AdapterFiles,
    names: Vec<(String, Vec<usize>)>,
    base: &Base,
) -> Result<Vec<Tensor>, MethodError> {
    let values = read(files, names.clone(), base)?.into_iter().zip(names);
    let tensors = values.map(|(values, (_, shape))| Tensor::from_vec(values, shape, &Device::Cpu));
    Ok(tensors.collect::<Result<_, _>>()?)
}

/// What the spec targets; the rank is checked again, because a file's config is from outside.
pub(super) fn targets(spec: &LoraSpec, base: &BaseInfo) -> Result<Vec<LoraTarget>, MethodError> {
    let targets = spec.targets(base).map_err(|error| MethodError::Mismatch(error.to_string()))?;
    if targets.is_empty() {
        return Err(MethodError::Mismatch(format!("target_modules match no module of {}", base.id)));
    }
    for target in &targets {
        let (outputs, inputs) = base.shape(target.site);
        let path = target.site.path(target.layer);
        if !(1..=outputs.min(inputs)).contains(&target.r) {
            return Err(MethodError::Mismatch(format!(
                "rank {} of {path} is outside 1 to {}",
                target.r,
                outputs.min(inputs)
            )));
        }
        if !target.scale.is_finite() {
            return Err(MethodError::Mismatch(format!("lora_alpha {} of {path} is not finite", target.alpha)));
        }
    }
    Ok(targets)
}

/// The target's module in PEFT's files.
pub(super) fn module(target: &LoraTarget) -> String {
    format!("base_model.model.{}", target.site.path(target.layer))
}

/// LoRA+: B and all that is no matrix learn faster than A, the embedding's A and B at a rate of their own (PEFT's
/// `optimizers/loraplus.py`).
pub(super) fn rate(spec: &LoraSpec, name: &str, peak: f64) -> f64 {
    match spec.loraplus_lr_ratio {
        None => 1.0,
        Some(_) if name.contains(".lora_embedding_") => spec.loraplus_lr_embedding / peak,
        Some(ratio) if name.ends_with(".lora_B.weight") || name.ends_with(".lora_magnitude_vector") => ratio,
        Some(ratio) if name.ends_with("norm.weight") => ratio,
        Some(_) => 1.0,
    }
}

/// PEFT's names and the shapes, A before B.
pub(super) fn names(targets: &[LoraTarget], base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
    let pair = |target: &LoraTarget| {
        let (outputs, inputs) = base.shape(target.site);
        let parts = match target.site {
            Site::Embed => ["lora_embedding_A", "lora_embedding_B"],
            _ => ["lora_A.weight", "lora_B.weight"],
        };
        let [a, b] = parts.map(|part| format!("{}.{part}", module(target)));
        [(a, vec![target.r, inputs]), (b, vec![outputs, target.r])]
    };
    targets.iter().flat_map(pair).collect()
}

fn train(
    spec: &LoraSpec,
    base: &BaseInfo,
    places: Places,
    values: Vec<Vec<f32>>,
) -> Result<Box<dyn Trainable>, MethodError> {
    let variables = file::variables(places.names(base), values)?;
    Ok(Box::new(Training { spec: spec.clone(), base: base.clone(), places, variables }))
}

impl Trainable for Training {
    fn hook(&self, train: Option<u64>) -> Result<Arc<dyn Hook>, candle_core::Error> {
        let tensors: Vec<Tensor> = self.variables.iter().map(|(_, variable)| variable.as_tensor().clone()).collect();
        Ok(Arc::new(self.places.hook(&self.spec, &self.base, &tensors, train)))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn rate(&self, name: &str, peak: f64) -> f64 {
        rate(&self.spec, name, peak)
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let config = file::config_bytes(&config::write(&self.spec, &self.base));
        Ok(AdapterFiles { config, weights: file::variable_bytes(&self.variables)? })
    }
}
