//! (IA)³: learned factors on the outputs of attention linears and the inputs of feed-forward ones.

mod config;
mod layer;

use std::sync::Arc;

use candle_core::{Tensor, Var};

use super::{AdapterFiles, Merge, Method, MethodError, Start, Trainable, file, variables};
use crate::{
    domain::{
        BaseInfo, Ia3Spec, Site,
        spec::{Ia3Target, Knobs},
    },
    model::{Base, Hook, Served},
};
use layer::{Factors, Ia3};

pub use config::read as spec_of;

/// (IA)³ while it is trained.
struct Training {
    /// With every module named.
    spec: Ia3Spec,
    base: BaseInfo,
    targets: Vec<Ia3Target>,
    /// `l` of each target, in their order and in PEFT's shape.
    variables: Vec<(String, Var)>,
}

impl Method for Ia3Spec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let base = &start.base.info;
        let shapes = shapes(&targets(self, base)?, base);
        let ones = shapes.iter().map(|(_, shape)| vec![1.0; shape.iter().product()]).collect();
        train(self, base, &variables::tensors(ones, &shapes)?)
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        let shapes = shapes(&targets(self, &base.info)?, &base.info);
        train(self, &base.info, &variables::read(&files.weights, &shapes)?)
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        let targets = targets(self, &base.info)?;
        if targets.iter().any(|target| target.is_feedforward && target.site != Site::Down) {
            return Ok(Arc::new(stored(self, files, base)?));
        }
        // Factors of outputs, and of what `down` takes: made for all adapters of a batch at once.
        let mut changes = Served::new(base.info.layers);
        let tensors = variables::read(&files.weights, &shapes(&targets, &base.info))?;
        for (target, l) in targets.iter().zip(tensors) {
            let l = l.flatten_all()?.to_vec1::<f32>()?;
            if target.is_feedforward {
                changes.layer(target.layer).product = Some(l);
            } else {
                let linear = base.linear(target.layer, target.site);
                changes.insert(target.layer, target.site, linear.low_rank(Vec::new(), &[], 0.0).rescaled(l, None));
            }
        }
        Ok(Arc::new(changes))
    }

    fn merge(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Merge>, MethodError> {
        Ok(Box::new(stored(self, files, base)?))
    }
}

fn stored(spec: &Ia3Spec, files: &AdapterFiles, base: &Base) -> Result<Ia3, MethodError> {
    let targets = targets(spec, &base.info)?;
    let tensors = variables::read(&files.weights, &shapes(&targets, &base.info))?;
    Ok(hook(&base.info, &targets, &tensors)?)
}

fn targets(spec: &Ia3Spec, base: &BaseInfo) -> Result<Vec<Ia3Target>, MethodError> {
    let targets = spec.targets(base).map_err(|error| MethodError::Mismatch(error.to_string()))?;
    if targets.is_empty() {
        return Err(MethodError::Mismatch(format!("target_modules match no module of {}", base.id)));
    }
    Ok(targets)
}

/// PEFT's names and shapes: a column for outputs, a row for inputs.
fn shapes(targets: &[Ia3Target], base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
    let name = |target: &Ia3Target| {
        let width = target.width(base);
        let shape = if target.is_feedforward { vec![1, width] } else { vec![width, 1] };
        (format!("base_model.model.{}.ia3_l", target.site.path(target.layer)), shape)
    };
    targets.iter().map(name).collect()
}

/// `tensors` are `l` of each target, in PEFT's shape.
fn hook(base: &BaseInfo, targets: &[Ia3Target], tensors: &[Tensor]) -> Result<Ia3, candle_core::Error> {
    let mut hook = Ia3::new(base.layers);
    for (target, l) in targets.iter().zip(tensors) {
        let row = l.reshape((1, target.width(base)))?;
        let factors = if target.is_feedforward { Factors::Input(row) } else { Factors::Output(row) };
        hook.insert(target.layer, target.site, factors);
    }
    Ok(hook)
}

/// `tensors` are the first values, in the targets' order.
fn train(spec: &Ia3Spec, base: &BaseInfo, tensors: &[Tensor]) -> Result<Box<dyn Trainable>, MethodError> {
    let mut spec = spec.clone();
    spec.fit(base, 0).map_err(|error| MethodError::Mismatch(error.to_string()))?;
    let targets = targets(&spec, base)?;
    let variables = variables::of(tensors, &shapes(&targets, base))?;
    Ok(Box::new(Training { spec, base: base.clone(), targets, variables }))
}

impl Trainable for Training {
    fn hook(&self, _: Option<u64>) -> Result<Arc<dyn Hook>, candle_core::Error> {
        let tensors: Vec<Tensor> = self.variables.iter().map(|(_, variable)| variable.as_tensor().clone()).collect();
        Ok(Arc::new(hook(&self.base, &self.targets, &tensors)?))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let config = file::config_bytes(&config::write(&self.spec, &self.base));
        Ok(AdapterFiles { config, weights: file::tensor_bytes(&variables::named(&self.variables)?) })
    }
}
