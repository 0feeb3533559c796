//! LoRA with its weights' lengths trained apart from their directions. PEFT's LORA files with `use_dora`.

mod layer;

use std::sync::Arc;

use candle_core::{Device, Result as Candle, Tensor, Var};
use serde_json::json;

use super::{
    AdapterFiles, Method, MethodError, Start, Trainable, file,
    lora::{self, layer::Adapted, layer::LowRank},
};
use crate::{
    domain::{BaseInfo, DoraSpec, spec::LoraTarget},
    model::{Base, Hook, Linear},
};
use layer::Decomposed;

/// One target with its frozen weights.
struct Place {
    target: LoraTarget,
    /// Without its bias.
    linear: Linear,
}

impl Place {
    /// `tensors` are A, B and m.
    fn change(&self, tensors: &[Tensor]) -> Candle<Decomposed> {
        let low_rank = LowRank { a: tensors[0].clone(), b: tensors[1].clone(), scale: self.target.scale };
        let norms = layer::norms(&self.linear, &low_rank)?;
        let factors = (&tensors[2] / Tensor::new(norms, &Device::Cpu)?)?;
        Ok(Decomposed { low_rank, factors })
    }
}

/// DoRA while it is trained.
struct Training {
    spec: DoraSpec,
    base: BaseInfo,
    places: Vec<Place>,
    /// A, B and m of each target, in the targets' order.
    variables: Vec<(String, Var)>,
}

impl Method for DoraSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let (places, info) = (places(self, start.base)?, &start.base.info);
        let mut values = Vec::with_capacity(3 * places.len());
        for place in &places {
            let (a, b) = lora::init::values(&self.0.init_lora_weights, &place.target, info, start.seed);
            let (outputs, inputs) = info.shape(place.target.site);
            let low_rank = LowRank {
                a: Tensor::from_slice(&a, (place.target.r, inputs), &Device::Cpu)?,
                b: Tensor::from_slice(&b, (outputs, place.target.r), &Device::Cpu)?,
                scale: place.target.scale,
            };
            let m = layer::norms(&place.linear, &low_rank)?;
            values.extend([a, b, m]);
        }
        train(self, info, places, values)
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        let places = places(self, base)?;
        let values = file::tensors(&files.weights, &names(&places, &base.info))?;
        train(self, &base.info, places, values)
    }

    /// The factors are made here once: a request pays for no norm.
    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        let places = places(self, base)?;
        let names = names(&places, &base.info);
        let tensors = file::tensors(&files.weights, &names)?
            .into_iter()
            .zip(names)
            .map(|(values, (_, shape))| Tensor::from_vec(values, shape, &Device::Cpu))
            .collect::<Candle<Vec<_>>>()?;
        Ok(hook(self, &base.info, &places, &tensors)?)
    }
}

fn places(spec: &DoraSpec, base: &Base) -> Result<Vec<Place>, MethodError> {
    let place = |target: LoraTarget| Place { target, linear: base.linear(target.layer, target.site).bare() };
    Ok(lora::targets(&spec.0, &base.info)?.into_iter().map(place).collect())
}

/// PEFT's names and the shapes: LoRA's A and B, then m.
fn names(places: &[Place], base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
    let of_place = |Place { target, .. }: &Place| {
        let magnitude = format!("{}.lora_magnitude_vector", lora::module(target));
        lora::names(&[*target], base).into_iter().chain([(magnitude, vec![base.shape(target.site).0])])
    };
    places.iter().flat_map(of_place).collect()
}

fn hook(spec: &DoraSpec, base: &BaseInfo, places: &[Place], tensors: &[Tensor]) -> Candle<Arc<dyn Hook>> {
    let mut hook = Adapted::new(base.layers, spec.0.lora_dropout);
    for (place, tensors) in places.iter().zip(tensors.chunks_exact(3)) {
        hook.insert(place.target.layer, place.target.site, place.change(tensors)?);
    }
    Ok(Arc::new(hook))
}

fn train(
    spec: &DoraSpec,
    base: &BaseInfo,
    places: Vec<Place>,
    values: Vec<Vec<f32>>,
) -> Result<Box<dyn Trainable>, MethodError> {
    let variables = file::variables(names(&places, base), values)?;
    Ok(Box::new(Training { spec: spec.clone(), base: base.clone(), places, variables }))
}

impl Trainable for Training {
    fn hook(&self, _: Option<u64>) -> Candle<Arc<dyn Hook>> {
        let tensors: Vec<Tensor> = self.variables.iter().map(|(_, variable)| variable.as_tensor().clone()).collect();
        hook(&self.spec, &self.base, &self.places, &tensors)
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn rate(&self, name: &str) -> f64 {
        lora::rate(&self.spec.0, name)
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let mut config = lora::config::write(&self.spec.0, &self.base);
        config.insert("use_dora", json!(true));
        Ok(AdapterFiles { config: file::config_bytes(&config), weights: file::variable_bytes(&self.variables)? })
    }
}
