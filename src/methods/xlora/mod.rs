//! X-LoRA: a classifier that mixes finished LoRA adapters, token by token.
//!
//! Its files hold copies of the experts, so that it stays what it is whatever becomes of the adapters it was made of.

mod classifier;
mod config;
pub mod directory;
mod layer;

use std::sync::{Arc, Mutex};

use candle_core::{Tensor, Var};

use super::{
    AdapterFiles, Method, MethodError, Start, Trainable,
    affine::Affine,
    as_lora, file,
    lora::{self, layer::LowRank},
    part::{Init, Part, Tensors},
    score, spec_of as any_spec_of,
};
use crate::{
    domain::{
        BaseInfo, LoraSpec, MethodSpec, SpecError, XloraSpec,
        spec::{Knobs, XloraExpert},
    },
    model::{Base, Hook},
};
use classifier::Classifier;
use layer::{Change, Experts, XLora};

pub use config::read as spec_of;

const CLASSIFIER: &str = "base_model.internal_xlora_classifier.layers";

/// An adapter's LoRA, where it can be an expert: other methods' changes are folded into one if they are low-rank.
pub fn expert(files: &AdapterFiles, base: &BaseInfo) -> Result<(LoraSpec, AdapterFiles), MethodError> {
    if score::split(files)?.is_some() {
        return Err(MethodError::Unsupported("an adapter with a task head cannot be an expert".into()));
    }
    let folded = as_lora(files, base)?;
    match any_spec_of(&folded)? {
        MethodSpec::Lora(spec) => Ok((spec, folded)),
        other => {
            let message = format!("an adapter of {} cannot be an expert: X-LoRA mixes LoRA", other.type_name());
            Err(MethodError::Unsupported(message))
        }
    }
}

impl Method for XloraSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let base = &start.base.info;
        let (mut spec, mut values) = (Self { experts: Vec::new(), ..self.clone() }, Vec::new());
        for files in start.experts {
            let (lora, files) = expert(files, base)?;
            let names = lora::names(&lora::targets(&lora, base)?, base);
            values.extend(file::tensors(&files.weights, &names)?);
            spec.experts.push(XloraExpert { generation: None, lora });
        }
        let parts = parts(&spec, base)?;
        let classifier = 2 * spec.xlora_depth;
        let first = Part::first_values(&parts[..classifier], start.seed);
        train(&spec, base, &parts, first.into_iter().chain(values).collect())
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        let parts = parts(self, &base.info)?;
        train(self, &base.info, &parts, file::tensors(&files.weights, &Part::expected(&parts))?)
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        let parts = parts(self, &base.info)?;
        let values = file::tensors(&files.weights, &Part::expected(&parts))?;
        Ok(Arc::new(Modules::new(self, &base.info, &Tensors::new(&parts, values)?)?.hook(false)))
    }
}

/// Every tensor of a spec that fits the base: the classifier's, then the experts', each under its own folder. It is checked
/// again, because a file's config is from outside.
fn parts(spec: &XloraSpec, base: &BaseInfo) -> Result<Vec<Part>, MethodError> {
    spec.check(base).map_err(|error| MethodError::Mismatch(error.to_string()))?;
    if spec.experts.is_empty() {
        return Err(MethodError::Mismatch("the adapters that X-LoRA mixes are not there".into()));
    }
    let mut parts = Vec::new();
    for (i, shape) in spec.classifier(base).into_iter().enumerate() {
        let init = Init::Uniform(shape[1]);
        parts.extend(Affine::parts(&layer_name(spec, i), shape, init, init));
    }
    for (i, expert) in spec.experts.iter().enumerate() {
        let names = lora::names(&lora::targets(&expert.lora, base)?, base);
        // Never begun anew.
        parts.extend(names.into_iter().map(|(name, shape)| Part::new(format!("{i}/{name}"), shape, Init::Zero)));
    }
    Ok(parts)
}

/// The classifier's linears stand in a list with what is between them.
fn layer_name(spec: &XloraSpec, layer: usize) -> String {
    let step = if spec.xlora_dropout_p > 0.0 { 3 } else { 2 };
    format!("{CLASSIFIER}.{}", layer * step)
}

fn train(
    spec: &XloraSpec,
    base: &BaseInfo,
    parts: &[Part],
    mut values: Vec<Vec<f32>>,
) -> Result<Box<dyn Trainable>, MethodError> {
    let trained = if spec.use_trainable_adapters { parts.len() } else { 2 * spec.xlora_depth };
    let (own, copied) = parts.split_at(trained);
    let copies = Tensors::new(copied, values.split_off(trained))?;
    let variables = file::variables(Part::expected(own), values)?;
    let tensors = Tensors::of(&variables).with(copies);
    let mut names: Vec<String> = parts.iter().map(|part| part.name.clone()).collect();
    names.sort_unstable();
    let modules = Modules::new(spec, base, &tensors)?;
    Ok(Box::new(Training { spec: spec.clone(), base: base.clone(), names, tensors, variables, modules }))
}

/// X-LoRA while it is trained.
struct Training {
    spec: XloraSpec,
    base: BaseInfo,
    /// All tensors of the files, sorted.
    names: Vec<String>,
    tensors: Tensors,
    variables: Vec<(String, Var)>,
    modules: Modules,
}

impl Trainable for Training {
    fn hook(&self, _: Option<u64>) -> candle_core::Result<Arc<dyn Hook>> {
        Ok(Arc::new(self.modules.hook(true)))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let named = self.names.iter().map(|name| {
            let tensor = self.tensors.get(name)?;
            Ok((name.clone(), tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1::<f32>()?))
        });
        let weights = file::tensor_bytes(&named.collect::<Result<Vec<_>, MethodError>>()?);
        Ok(AdapterFiles { config: file::config_bytes(&config::write(&self.spec, &self.base)), weights })
    }
}

/// The tensors in their places; while training they share their memory with the variables.
struct Modules {
    experts: Arc<Experts>,
    first: Option<(Arc<Experts>, f64)>,
    classifier: Arc<Classifier>,
}

impl Modules {
    fn new(spec: &XloraSpec, base: &BaseInfo, tensors: &Tensors) -> candle_core::Result<Self> {
        let layers = (0..spec.xlora_depth).map(|i| Affine::of(tensors, &layer_name(spec, i)));
        let classifier =
            Classifier { layers: layers.collect::<Result<_, _>>()?, experts: spec.experts.len(), spec: spec.clone() };
        let weight = spec.scaling_pass_value * spec.global_scaling_weight;
        let first = match weight != 0.0 {
            true => Some((Arc::new(experts(spec, base, |name| Ok(tensors.get(name)?.detach()))?), weight)),
            false => None,
        };
        let experts = experts(spec, base, |name| tensors.get(name))?;
        Ok(Self { experts: Arc::new(experts), first, classifier: Arc::new(classifier) })
    }

    fn hook(&self, is_trained: bool) -> XLora {
        XLora {
            experts: self.experts.clone(),
            first: self.first.clone(),
            classifier: self.classifier.clone(),
            shares: is_trained.then(Mutex::default),
        }
    }
}

fn experts(
    spec: &XloraSpec,
    base: &BaseInfo,
    get: impl Fn(&str) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Experts> {
    let mut experts: Experts = (0..base.layers).map(|_| Default::default()).collect();
    if spec.layerwise_scalings {
        for (place, (layer, site)) in spec.linears(base).into_iter().enumerate() {
            experts[layer][site as usize].first = place * spec.experts.len();
        }
    }
    for (i, expert) in spec.experts.iter().enumerate() {
        let targets = expert.lora.targets(base).map_err(|error: SpecError| candle_core::Error::wrap(error))?;
        for target in targets {
            let part = |part: &str| get(&format!("{i}/{}.{part}.weight", lora::module(&target)));
            let low_rank = LowRank { a: part("lora_A")?, b: part("lora_B")?, scale: target.scale };
            let change = Change { expert: i, low_rank, dropout: expert.lora.lora_dropout };
            experts[target.layer][target.site as usize].changes.push(change);
        }
    }
    Ok(experts)
}
