//! Low-rank adaptation: two small matrices beside each chosen linear.

pub(super) mod config;
pub(super) mod init;
pub(super) mod layer;

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use super::{AdapterFiles, Method, MethodError, Start, Trainable, file};
use crate::{
    domain::{BaseInfo, DoraSpec, LoraSpec, MethodSpec, spec::LoraTarget},
    model::{Base, Hook, LowRanks},
};
use layer::{Adapted, LowRank};

/// LoRA's spec or DoRA's, whose files differ in one key.
pub fn spec_of(config: &serde_json::Map<String, serde_json::Value>) -> Result<MethodSpec, MethodError> {
    let spec = config::read(config)?;
    Ok(match file::field(config, "use_dora")? {
        Some(true) => MethodSpec::Dora(DoraSpec(spec)),
        _ => MethodSpec::Lora(spec),
    })
}

/// LoRA while it is trained.
struct Training {
    spec: LoraSpec,
    base: BaseInfo,
    /// A and B of each target, in the targets' order.
    variables: Vec<(String, Var)>,
    hook: Arc<Adapted<LowRank>>,
}

impl Method for LoraSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let base = &start.base.info;
        let targets = targets(self, base)?;
        let values = targets.iter().flat_map(|target| {
            let (a, b) = init::values(&self.init_lora_weights, target, base, start.seed);
            [a, b]
        });
        train(self, base, &targets, values.collect())
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        let targets = targets(self, &base.info)?;
        let values = file::tensors(&files.weights, &names(&targets, &base.info))?;
        train(self, &base.info, &targets, values)
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        let targets = targets(self, &base.info)?;
        let values = file::tensors(&files.weights, &names(&targets, &base.info))?;
        let mut changes = LowRanks::new(base.info.layers);
        let mut values = values.into_iter();
        for (target, (a, b)) in targets.iter().zip(std::iter::from_fn(|| values.next().zip(values.next()))) {
            let linear = base.linear(target.layer, target.site);
            changes.insert(target.layer, target.site, linear.low_rank(a, &b, target.scale));
        }
        Ok(Arc::new(changes))
    }
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

/// LoRA+: B and all that is no matrix learn faster than A (PEFT's `optimizers/loraplus.py`).
pub(super) fn rate(spec: &LoraSpec, name: &str) -> f64 {
    match spec.loraplus_lr_ratio {
        Some(ratio) if !name.ends_with("lora_A.weight") => ratio,
        _ => 1.0,
    }
}

/// PEFT's names and the shapes, A before B.
pub(super) fn names(targets: &[LoraTarget], base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
    let pair = |target: &LoraTarget| {
        let (outputs, inputs) = base.shape(target.site);
        let module = module(target);
        [
            (format!("{module}.lora_A.weight"), vec![target.r, inputs]),
            (format!("{module}.lora_B.weight"), vec![outputs, target.r]),
        ]
    };
    targets.iter().flat_map(pair).collect()
}

/// `tensors` are A and B of each target in turn.
fn hook(spec: &LoraSpec, base: &BaseInfo, targets: &[LoraTarget], tensors: &[Tensor]) -> Adapted<LowRank> {
    let mut hook = Adapted::new(base.layers, spec.lora_dropout);
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
    let variables = file::variables(names(targets, base), values)?;
    let tensors: Vec<Tensor> = variables.iter().map(|(_, variable)| variable.as_tensor().clone()).collect();
    let hook = Arc::new(hook(spec, base, targets, &tensors));
    Ok(Box::new(Training { spec: spec.clone(), base: base.clone(), variables, hook }))
}

impl Trainable for Training {
    fn hook(&self, _: Option<u64>) -> Result<Arc<dyn Hook>, candle_core::Error> {
        Ok(self.hook.clone())
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn rate(&self, name: &str) -> f64 {
        rate(&self.spec, name)
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let config = file::config_bytes(&config::write(&self.spec, &self.base));
        Ok(AdapterFiles { config, weights: file::variable_bytes(&self.variables)? })
    }
}
