//! LoRA with its weights' lengths trained apart from their directions. PEFT's LORA files with `use_dora`.

mod layer;

use std::sync::Arc;

use candle_core::{Device, Result as Candle, Tensor, Var};
use serde_json::json;

use super::{
    AdapterFiles, Merge, Method, MethodError, Start, Trainable, file,
    lora::{self, layer::Adapted, layer::LowRank},
    saved::Choice,
};
use crate::{
    domain::{BaseInfo, DoraSpec, Site, spec::LoraTarget},
    model::{Base, Hook, Linear, Served},
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

/// Everything of a spec that its tensors go to.
struct Places {
    targets: Vec<Place>,
    saved: Choice,
}

/// DoRA while it is trained.
struct Training {
    spec: DoraSpec,
    base: BaseInfo,
    places: Places,
    /// A, B and m of each target, in the targets' order, then what is saved.
    variables: Vec<(String, Var)>,
}

impl Method for DoraSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let (places, info) = (Places::new(self, start.base)?, &start.base.info);
        let mut values = Vec::with_capacity(3 * places.targets.len());
        for Place { target, linear } in &places.targets {
            let (a, b) = lora::init::values(&self.0.init_lora_weights, target, info, start.seed);
            let (outputs, inputs) = linear.shape();
            let low_rank = LowRank {
                a: Tensor::from_slice(&a, (target.r, inputs), &Device::Cpu)?,
                b: Tensor::from_slice(&b, (outputs, target.r), &Device::Cpu)?,
                scale: target.scale,
            };
            let m = layer::norms(linear, &low_rank)?;
            values.extend([a, b, m]);
        }
        values.extend(places.saved.values(start.base)?);
        train(self, info, places, values)
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        let places = Places::new(self, base)?;
        let values = lora::read(files, places.names(&base.info), base)?;
        train(self, &base.info, places, values)
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        let places = Places::new(self, base)?;
        if !places.are_linears() {
            return Ok(Arc::new(adapted(self, files, base)?));
        }
        // Nothing but linears of the layers: made for all adapters of a batch at once, as LoRA is.
        let mut changes = Served::new(base.info.layers);
        let tensors = lora::tensors(files, places.names(&base.info), base)?;
        for (place, tensors) in places.targets.iter().zip(tensors.chunks_exact(3)) {
            let Decomposed { low_rank, factors } = place.change(tensors)?;
            let (layer, site) = (place.target.layer, place.target.site);
            let linear = base.linear(layer, site);
            let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
            let change = linear.low_rank(numbers(&low_rank.a)?, &numbers(&low_rank.b)?, low_rank.scale);
            changes.insert(layer, site, change.rescaled(numbers(&factors)?, linear.bias().cloned()));
        }
        Ok(Arc::new(changes))
    }

    fn merge(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Merge>, MethodError> {
        Ok(Box::new(adapted(self, files, base)?))
    }
}

/// The factors are made here once: a request pays for no norm.
fn adapted(spec: &DoraSpec, files: &AdapterFiles, base: &Base) -> Result<Adapted<Decomposed>, MethodError> {
    let places = Places::new(spec, base)?;
    let tensors = lora::tensors(files, places.names(&base.info), base)?;
    Ok(places.hook(spec, &base.info, &tensors, None)?)
}

impl Places {
    fn new(spec: &DoraSpec, base: &Base) -> Result<Self, MethodError> {
        let targets = lora::targets(&spec.0, &base.info)?;
        if targets.iter().any(|target| target.site == Site::Embed) {
            return Err(MethodError::Unsupported("use_dora: embed_tokens is not supported as a target".into()));
        }
        let place = |target: LoraTarget| Place { target, linear: base.linear(target.layer, target.site).bare() };
        Ok(Self { targets: targets.into_iter().map(place).collect(), saved: Choice::of(&spec.0, &base.info)? })
    }

    fn are_linears(&self) -> bool {
        self.saved.is_empty() && self.targets.iter().all(|place| Site::LAYER.contains(&place.target.site))
    }

    /// PEFT's names and the shapes: LoRA's A and B, then m.
    fn names(&self, base: &BaseInfo) -> Vec<(String, Vec<usize>)> {
        let of_place = |Place { target, .. }: &Place| {
            let magnitude = format!("{}.lora_magnitude_vector", lora::module(target));
            lora::names(&[*target], base).into_iter().chain([(magnitude, vec![base.shape(target.site).0])])
        };
        self.targets.iter().flat_map(of_place).chain(self.saved.names(base)).collect()
    }

    fn hook(
        &self,
        spec: &DoraSpec,
        base: &BaseInfo,
        tensors: &[Tensor],
        train: Option<u64>,
    ) -> Candle<Adapted<Decomposed>> {
        let (triples, saved) = tensors.split_at(3 * self.targets.len());
        let mut hook = Adapted::new(base.layers, spec.0.lora_dropout).of_pass(train, self.saved.saved(saved));
        for (place, tensors) in self.targets.iter().zip(triples.chunks_exact(3)) {
            hook.insert(place.target.layer, place.target.site, place.change(tensors)?);
        }
        Ok(hook)
    }
}

fn train(
    spec: &DoraSpec,
    base: &BaseInfo,
    places: Places,
    values: Vec<Vec<f32>>,
) -> Result<Box<dyn Trainable>, MethodError> {
    let variables = file::variables(places.names(base), values)?;
    Ok(Box::new(Training { spec: spec.clone(), base: base.clone(), places, variables }))
}

impl Trainable for Training {
    fn hook(&self, train: Option<u64>) -> Candle<Arc<dyn Hook>> {
        let tensors: Vec<Tensor> = self.variables.iter().map(|(_, variable)| variable.as_tensor().clone()).collect();
        Ok(Arc::new(self.places.hook(&self.spec, &self.base, &tensors, train)?))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn rate(&self, name: &str, peak: f64) -> f64 {
        lora::rate(&self.spec.0, name, peak)
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let mut config = lora::config::write(&self.spec.0, &self.base);
        config.insert("use_dora", json!(true));
        Ok(AdapterFiles { config: file::config_bytes(&config), weights: file::variable_bytes(&self.variables)? })
    }
}
