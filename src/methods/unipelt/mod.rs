//! UniPELT: LoRA, a prefix and a bottleneck in each layer, each behind a gate that learns when it helps.

mod adapterhub;
mod config;
mod layer;
mod serving;

use std::sync::Arc;

use candle_core::Var;

use super::{
    AdapterFiles, Method, MethodError, Start, Trainable,
    affine::Affine,
    file,
    part::{Init, Part, Tensors},
};
use crate::{
    domain::{
        BaseInfo, Site, UnipeltSpec,
        spec::{GateMode, Knobs},
    },
    model::{Base, Hook},
};
use layer::{Encoder, GatedLora, Layer, Unipelt};

pub use adapterhub::write as as_adapterhub;
pub use config::read as spec_of;

impl Method for UnipeltSpec {
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
        let modules = Modules::new(self.gate_mode, &base.info, &Tensors::new(&parts, values)?)?;
        // Elsewhere than on the CPU, its ops are candle's; and gates over whole texts are not a row's own.
        let is_fused = base.is_fused() && self.gate_mode == GateMode::Token;
        Ok(if is_fused { Arc::new(serving::of(&modules, base)?) } else { modules.hook()? })
    }
}

/// `unipelt.layers.3.self_attn.q_proj`
fn module(layer: usize, name: &str) -> String {
    format!("unipelt.layers.{layer}.{name}")
}

const EMBEDDING: &str = "unipelt.prefix_tuning.wte.weight";
const INNER: &str = "unipelt.prefix_tuning.control_trans.0";
const OUTER: &str = "unipelt.prefix_tuning.control_trans.2";

/// Every tensor of a spec that fits the base; it is checked again, because a file's config is from outside.
///
/// As in AdapterHub: bottlenecks and the weights of gates begin normal with deviation 0.02, LoRA's as LoRA's do, all
/// else as PyTorch fills it.
fn parts(spec: &UnipeltSpec, base: &BaseInfo) -> Result<Vec<Part>, MethodError> {
    spec.check(base).map_err(|error| MethodError::Mismatch(error.to_string()))?;
    let (h, small) = (base.hidden, Init::Normal(0.02));
    let mut parts = Vec::new();
    let mut affine = |name: String, shape: [usize; 2], weight: Init, bias: Init| {
        parts.extend(Affine::parts(&name, shape, weight, bias));
    };
    for layer in 0..base.layers {
        for site in [Site::Q, Site::V] {
            affine(module(layer, &format!("{}.gate", site.module())), [1, h], small, Init::Uniform(h));
        }
        affine(module(layer, "self_attn.prefix_gate"), [1, h], small, Init::Uniform(h));
        affine(module(layer, "output_adapter.adapter_down"), [spec.width(base), h], small, Init::Zero);
        affine(module(layer, "output_adapter.adapter_up"), [h, spec.width(base)], small, Init::Zero);
        affine(module(layer, "output_adapter.gate"), [1, h], small, Init::Zero);
    }
    let m = spec.bottleneck_size;
    affine(INNER.to_owned(), [m, h], Init::Uniform(h), Init::Uniform(h));
    affine(OUTER.to_owned(), [UnipeltSpec::prefix_width(base), m], Init::Uniform(m), Init::Uniform(m));
    parts.push(Part::new(EMBEDDING, [spec.prefix_length, h], Init::Normal(1.0)));
    for (layer, site) in (0..base.layers).flat_map(|layer| [(layer, Site::Q), (layer, Site::V)]) {
        let ((outputs, inputs), module) = (base.shape(site), module(layer, site.module()));
        parts.push(Part::new(format!("{module}.lora_A.weight"), [spec.lora_r, inputs], Init::Uniform(inputs)));
        parts.push(Part::new(format!("{module}.lora_B.weight"), [outputs, spec.lora_r], Init::Zero));
    }
    Ok(parts)
}

fn train(
    spec: &UnipeltSpec,
    base: &BaseInfo,
    parts: &[Part],
    values: Vec<Vec<f32>>,
) -> Result<Box<dyn Trainable>, MethodError> {
    let variables = file::variables(Part::expected(parts), values)?;
    let modules = Modules::new(spec.gate_mode, base, &Tensors::of(&variables))?;
    Ok(Box::new(Training { spec: spec.clone(), base: base.clone(), variables, modules }))
}

/// UniPELT while it is trained.
struct Training {
    spec: UnipeltSpec,
    base: BaseInfo,
    variables: Vec<(String, Var)>,
    modules: Modules,
}

impl Trainable for Training {
    fn hook(&self, _: Option<u64>) -> candle_core::Result<Arc<dyn Hook>> {
        self.modules.hook()
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let config = file::config_bytes(&config::write(&self.spec, &self.base));
        Ok(AdapterFiles { config, weights: file::variable_bytes(&self.variables)? })
    }
}

/// The tensors in their places; while training they share their memory with the variables.
struct Modules {
    mode: GateMode,
    layers: Arc<Vec<Layer>>,
    encoder: Encoder,
}

impl Modules {
    fn new(mode: GateMode, base: &BaseInfo, tensors: &Tensors) -> candle_core::Result<Self> {
        let get = |name: &str| tensors.get(name);
        let affine = |name: &str| Affine::of(tensors, name);
        let lora = |layer: usize, site: Site| {
            let module = module(layer, site.module());
            let (a, b) = (get(&format!("{module}.lora_A.weight"))?, get(&format!("{module}.lora_B.weight"))?);
            candle_core::Result::Ok(GatedLora { a, b, gate: affine(&format!("{module}.gate"))? })
        };
        let layers = (0..base.layers).map(|layer| {
            Ok(Layer {
                q: lora(layer, Site::Q)?,
                v: lora(layer, Site::V)?,
                prefix_gate: affine(&module(layer, "self_attn.prefix_gate"))?,
                down: affine(&module(layer, "output_adapter.adapter_down"))?,
                up: affine(&module(layer, "output_adapter.adapter_up"))?,
                bottleneck_gate: affine(&module(layer, "output_adapter.gate"))?,
            })
        });
        let layers = Arc::new(layers.collect::<candle_core::Result<Vec<_>>>()?);
        let encoder = Encoder { embedding: get(EMBEDDING)?, inner: affine(INNER)?, outer: affine(OUTER)? };
        Ok(Self { mode, layers, encoder })
    }

    /// The hook of one pass: the prefix is made of the encoder's present values.
    fn hook(&self) -> candle_core::Result<Arc<dyn Hook>> {
        let prefixes = self.encoder.prefixes(self.layers.len())?;
        let length = self.encoder.embedding.dim(0)?;
        Ok(Arc::new(Unipelt { mode: self.mode, layers: self.layers.clone(), prefixes, length }))
    }
}
