//! LoRA as llama.cpp's adapter file: `blk.0.attn_q.weight.lora_a` is A, `….lora_b` is B, its rows in the file's order.
//!
//! llama.cpp has one alpha for all, and scales each pair by alpha over its rank. A target whose own scale is another
//! has the rest of it in B.

use candle_core::{Device, Tensor};

use super::{Places, read};
use crate::{
    domain::{LoraSpec, Site},
    formats::{
        Storage,
        gguf::write::{self, Metadata},
    },
    methods::{AdapterFiles, MethodError},
    model::{Base, gguf},
};

pub fn write(spec: &LoraSpec, files: &AdapterFiles, base: &Base) -> Result<Vec<u8>, MethodError> {
    let unsupported = |message: &str| MethodError::Unsupported(message.to_owned());
    let architecture = base.gguf_architecture().map_err(MethodError::Unsupported)?;
    let places = Places::new(spec, &base.info)?;
    if !places.saved.is_empty() {
        return Err(unsupported("llama.cpp's adapters hold no saved modules or tokens: merge it instead"));
    }
    for target in &places.targets {
        match target.site {
            Site::Embed => return Err(unsupported("an adapted embedding has no such file: merge it instead")),
            Site::Head if base.info.tied => {
                return Err(unsupported("llama.cpp has no output layer of its own on a tied base: merge it instead"));
            }
            _ => {}
        }
    }
    let mut metadata = Metadata::default();
    metadata.set_str("general.architecture", architecture);
    metadata.set_str("general.type", "adapter");
    metadata.set_str("adapter.type", "lora");
    metadata.set_f32("adapter.lora.alpha", spec.lora_alpha as f32);
    let mut values = read(files, places.names(&base.info), base)?.into_iter();
    let mut tensors = Vec::new();
    for (target, (a, b)) in places.targets.iter().zip(std::iter::from_fn(|| values.next().zip(values.next()))) {
        let (outputs, inputs) = base.info.shape(target.site);
        let hf = format!("{}.weight", target.site.path(target.layer));
        let Some(name) = gguf::name(&hf, |name| name.contains("ffn_gate")) else {
            return Err(MethodError::Unsupported(format!("{hf} has no name in gguf files")));
        };
        let factor = target.scale * target.r as f64 / spec.lora_alpha;
        let a = Tensor::from_vec(a, (target.r, inputs), &Device::Cpu)?;
        let b = Tensor::from_vec(b, (outputs, target.r), &Device::Cpu)?;
        let b = base.gguf_rows(target.site, &b)?.affine(factor, 0.0)?;
        for (part, tensor) in [("lora_a", a), ("lora_b", b)] {
            tensors.push(write::Tensor {
                name: format!("{name}.{part}"),
                shape: tensor.dims().to_vec(),
                storage: Storage::F32,
                data: gguf::encode(Storage::F32, &tensor)?,
            });
        }
    }
    write::write(&metadata, &tensors).ok_or_else(|| unsupported("gguf files have no NF4"))
}
