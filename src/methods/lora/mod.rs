//! Low-rank adaptation: two small matrices beside each chosen linear.

mod config;
mod init;
mod layer;

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use super::{AdapterFiles, MethodError, Trainable, file};
use crate::{
    domain::{BaseInfo, LoraSpec, spec::LoraTarget},
    model::Hook,
};
use layer::{Lora, LowRank};

pub use config::read as spec_of;

/// LoRA while it is trained.
struct Training {
    spec: LoraSpec,
    base: BaseInfo,
    /// A and B of each target, in the targets' order.
    variables: Vec<(String, Var)>,
    hook: Arc<Lora>,
}

pub fn create(spec: &LoraSpec, base: &BaseInfo, seed: u64) -> Result<Box<dyn Trainable>, MethodError> {
    let targets = targets(spec, base)?;
    let values = targets.iter().flat_map(|target| {
        let (a, b) = init::values(&spec.init_lora_weights, target, base, seed);
        [a, b]
    });
    train(spec, base, &targets, values.collect())
}

pub fn resume(spec: &LoraSpec, files: &AdapterFiles, base: &BaseInfo) -> Result<Box<dyn Trainable>, MethodError> {
    let targets = targets(spec, base)?;
    let values = file::tensors(&files.weights, &names(&targets, base))?;
    train(spec, base, &targets, values)
}

pub fn load(spec: &LoraSpec, files: &AdapterFiles, base: &BaseInfo) -> Result<Arc<dyn Hook>, MethodError> {
    let targets = targets(spec, base)?;
    let names = names(&targets, base);
    let values = file::tensors(&files.weights, &names)?;
    let tensors: Vec<Tensor> = values
        .into_iter()
        .zip(&names)
        .map(|(values, (_, shape))| Tensor::from_vec(values, shape.as_slice(), &Device::Cpu))
        .collect::<Result<_, _>>()?;
    Ok(Arc::new(hook(spec, base, &targets, &tensors)))
}

/// What the spec targets; the rank is checked again, because a file's config is from outside.
fn targets(spec: &LoraSpec, base: &BaseInfo) -> Result<Vec<LoraTarget>, MethodError> {
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

/// PEFT's names and the shapes, A before B.
fn names(targets: &[LoraTarget], base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
    let pair = |target: &LoraTarget| {
        let (outputs, inputs) = base.shape(target.site);
        let module = format!("base_model.model.{}", target.site.path(target.layer));
        [
            (format!("{module}.lora_A.weight"), vec![target.r, inputs]),
            (format!("{module}.lora_B.weight"), vec![outputs, target.r]),
        ]
    };
    targets.iter().flat_map(pair).collect()
}

/// `tensors` are A and B of each target in turn.
fn hook(spec: &LoraSpec, base: &BaseInfo, targets: &[LoraTarget], tensors: &[Tensor]) -> Lora {
    let mut hook = Lora::new(base.layers, spec.lora_dropout);
    for (target, pair) in targets.iter().zip(tensors.chunks_exact(2)) {
        let change = LowRank { a: pair[0].clone(), b: pair[1].clone(), scale: target.scale };
        hook.insert(target.layer, target.site, change);
    }
    hook
}

fn train(
    spec: &LoraSpec,
    base: &BaseInfo,
    targets: &[LoraTarget],
    values: Vec<Vec<f32>>,
) -> Result<Box<dyn Trainable>, MethodError> {
    let variables = values
        .into_iter()
        .zip(names(targets, base))
        .map(|(values, (name, shape))| {
            Ok((name, Var::from_tensor(&Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?)?))
        })
        .collect::<Result<Vec<_>, candle_core::Error>>()?;
    let tensors: Vec<Tensor> = variables.iter().map(|(_, variable)| variable.as_tensor().clone()).collect();
    let hook = Arc::new(hook(spec, base, targets, &tensors));
    Ok(Box::new(Training { spec: spec.clone(), base: base.clone(), variables, hook }))
}

impl Trainable for Training {
    fn hook(&self) -> Arc<dyn Hook> {
        self.hook.clone()
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let tensors = self
            .variables
            .iter()
            .map(|(name, variable)| {
                Ok((name.clone(), variable.dims().to_vec(), variable.flatten_all()?.to_vec1::<f32>()?))
            })
            .collect::<Result<Vec<_>, candle_core::Error>>()?;
        let config = file::config_bytes(&config::write(&self.spec, &self.base));
        Ok(AdapterFiles { config, weights: file::tensor_bytes(&tensors) })
    }
}
