//! Mixtures of low-rank experts: MixLoRA, MoLA, LoRAMoE and AdaMoLE.

mod adamole;
mod balance;
mod config;
mod experts;
mod linears;
mod loramoe;
mod mixlora;
mod modules;
mod names;
mod router;
mod serving;
#[cfg(test)]
mod tests;
mod top_k;

use std::sync::Arc;

use candle_core::Var;

use super::{
    AdapterFiles, Method, MethodError, Start, Trainable, file,
    part::{Part, Tensors},
};
use crate::{
    domain::{BaseInfo, MoeLoraSpec, SpecError, spec::Knobs},
    model::{Base, Hook},
};
use modules::Modules;

pub use config::{read as spec_of, variant};

impl Method for MoeLoraSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let parts = parts(self, &start.base.info)?;
        train(self, &start.base.info, &parts, Part::first_values(&parts, start.seed))
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        let parts = parts(self, &base.info)?;
        train(self, &base.info, &parts, file::tensors(&files.weights, &Part::expected(&parts))?)
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        let parts = parts(self, &base.info)?;
        let values = file::tensors(&files.weights, &Part::expected(&parts))?;
        Ok(Modules::new(self, &base.info, &Tensors::new(&parts, values)?)?.serving(base)?)
    }
}

/// Every tensor of a spec that fits the base; it is checked again, because a file's config is from outside.
fn parts(spec: &MoeLoraSpec, base: &BaseInfo) -> Result<Vec<Part>, MethodError> {
    let mismatch = |error: SpecError| MethodError::Mismatch(error.to_string());
    spec.check(base).map_err(mismatch)?;
    names::parts(spec, base).map_err(mismatch)
}

fn train(
    spec: &MoeLoraSpec,
    base: &BaseInfo,
    parts: &[Part],
    values: Vec<Vec<f32>>,
) -> Result<Box<dyn Trainable>, MethodError> {
    let variables = file::variables(Part::expected(parts), values)?;
    let modules = Modules::new(spec, base, &Tensors::of(&variables))?;
    Ok(Box::new(Training { spec: spec.clone(), base: base.clone(), variables, modules }))
}

/// A mixture while it is trained.
struct Training {
    spec: MoeLoraSpec,
    base: BaseInfo,
    variables: Vec<(String, Var)>,
    modules: Modules,
}

impl Trainable for Training {
    fn hook(&self, _: Option<u64>) -> candle_core::Result<Arc<dyn Hook>> {
        Ok(self.modules.training())
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let config = file::config_bytes(&config::write(&self.spec, &self.base));
        Ok(AdapterFiles { config, weights: file::variable_bytes(&self.variables)? })
    }
}
