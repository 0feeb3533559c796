//! Full fine-tuning: every weight of the base, trained as it is.
//!
//! Training keeps a copy in F32 in the place of the frozen weights, and so does serving: such an adapter is a whole model
//! that shares nothing with the resident base but its shape. Its file has the tensors of the model's own
//! `model.safetensors`, by their names there; a tied output layer is the embedding.

mod layer;

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{Result as Candle, Tensor, Var};
use serde_json::{Map, Value, json};

use super::{
    AdapterFiles, Merge, Method, MethodError, Start, Trainable, config, file,
    lora::layer::Adapted,
    saved::{self, Saved},
    variables,
};
use crate::{
    domain::{BaseInfo, FullSpec, Site, spec::SavedModule},
    model::{Base, Hook},
};
use layer::Dense;

/// `peft_type` of its config.
const TYPE: &str = "FULL";

/// Where tensors go.
#[derive(Clone, Copy)]
enum Place {
    Module(SavedModule),
    /// A weight, and its bias.
    Linear {
        layer: usize,
        site: Site,
        has_bias: bool,
    },
}

impl Place {
    /// All of a base.
    fn all(base: &Base) -> Vec<Self> {
        let is_own = |module: &SavedModule| *module != SavedModule::Head || !base.info.tied;
        let modules = SavedModule::all(&base.info).filter(is_own).map(Self::Module);
        let linears = base.info.linears().map(|(layer, site)| {
            let has_bias = base.linear(layer, site).bias().is_some();
            Self::Linear { layer, site, has_bias }
        });
        modules.chain(linears).collect()
    }

    /// Hugging Face's names and the shapes.
    fn shapes(self, base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
        match self {
            Self::Module(module) => vec![(format!("{}.weight", module.path()), module.shape(base))],
            Self::Linear { layer, site, has_bias } => {
                let ((outputs, inputs), path) = (base.shape(site), site.path(layer));
                let bias = has_bias.then(|| (format!("{path}.bias"), vec![outputs]));
                [(format!("{path}.weight"), vec![outputs, inputs])].into_iter().chain(bias).collect()
            }
        }
    }

    /// The base's own, in the order of the names.
    fn values(self, base: &Base) -> Candle<Vec<Vec<f32>>> {
        match self {
            Self::Module(module) => Ok(vec![saved::of_base(module, base)?]),
            Self::Linear { layer, site, .. } => {
                let linear = base.linear(layer, site);
                let weight = linear.dequantize()?.flatten_all()?.to_vec1()?;
                Ok([weight].into_iter().chain(linear.bias().map(|bias| bias.to_vec())).collect())
            }
        }
    }
}

fn shapes(places: &[Place], base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
    places.iter().flat_map(|place| place.shapes(base)).collect()
}

/// The tensors stand in the order of the names.
fn hook(places: &[Place], base: &BaseInfo, tensors: Vec<Tensor>) -> Candle<Adapted<Dense>> {
    let mut tensors = tensors.into_iter();
    let mut next = || tensors.next().ok_or_else(|| candle_core::Error::Msg("a tensor is missing".to_owned()));
    let (mut hook, mut modules) = (Adapted::new(base.layers, 0.0), Vec::new());
    for place in places {
        match *place {
            Place::Module(module) => modules.push((module, next()?)),
            Place::Linear { layer, site, has_bias } => {
                let (weight, bias) = (next()?, if has_bias { Some(next()?) } else { None });
                hook.insert(layer, site, Dense { weight, bias });
            }
        }
    }
    let embedding = modules.iter().find(|(module, _)| base.tied && *module == SavedModule::Embed);
    let head = embedding.map(|(_, rows)| (SavedModule::Head, rows.clone()));
    modules.extend(head);
    Ok(hook.of_pass(None, Saved::of(modules)))
}

/// The config that stands for it.
pub fn spec_of(fields: &Map<String, Value>) -> Result<FullSpec, MethodError> {
    config::only(fields, "task_type", "CAUSAL_LM")?;
    Ok(FullSpec {})
}

/// A model while it is trained.
struct Training {
    base: BaseInfo,
    places: Vec<Place>,
    variables: Vec<(String, Var)>,
}

impl Method for FullSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let places = Place::all(start.base);
        let values: Vec<Vec<Vec<f32>>> = places.iter().map(|place| place.values(start.base)).collect::<Candle<_>>()?;
        train(places, start.base, values.into_iter().flatten().collect())
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        let places = Place::all(base);
        let values = file::tensors(&files.weights, &shapes(&places, &base.info))?;
        train(places, base, values)
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        Ok(Arc::new(stored(files, base)?))
    }

    fn merge(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Merge>, MethodError> {
        Ok(Box::new(stored(files, base)?))
    }
}

fn stored(files: &AdapterFiles, base: &Base) -> Result<Adapted<Dense>, MethodError> {
    let places = Place::all(base);
    let tensors = variables::read(&files.weights, &shapes(&places, &base.info))?;
    Ok(hook(&places, &base.info, tensors)?)
}

fn train(places: Vec<Place>, base: &Base, values: Vec<Vec<f32>>) -> Result<Box<dyn Trainable>, MethodError> {
    let variables = file::variables(shapes(&places, &base.info), values)?;
    Ok(Box::new(Training { base: base.info.clone(), places, variables }))
}

impl Trainable for Training {
    fn hook(&self, _: Option<u64>) -> Candle<Arc<dyn Hook>> {
        let tensors = self.variables.iter().map(|(_, variable)| variable.as_tensor().clone()).collect();
        Ok(Arc::new(hook(&self.places, &self.base, tensors)?))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let config = BTreeMap::from([
            ("base_model_name_or_path", json!(self.base.id)),
            ("peft_type", json!(TYPE)),
            ("task_type", json!("CAUSAL_LM")),
        ]);
        Ok(AdapterFiles { config: file::config_bytes(&config), weights: file::variable_bytes(&self.variables)? })
    }
}
