//! AdaLoRA as plain LoRA: the same change in a format that everything reads.
//!
//! `A' = A ⊙ E · alpha / (init_r + 1e-5)`, `B' = B`; each module that has triplets left is a target of its own rank,
//! and the alpha equals it, so that LoRA's scale is 1.

use super::{Stored, scale, triplets};
use crate::{
    domain::{
        AdaLoraSpec, BaseInfo, LoraSpec,
        spec::{LoraInit, Targets},
    },
    methods::{AdapterFiles, MethodError, Named, file, lora},
};

pub fn as_lora(spec: &AdaLoraSpec, files: &AdapterFiles, base: &BaseInfo) -> Result<AdapterFiles, MethodError> {
    let Stored { modules, tensors, .. } = Stored::read(spec, files, base)?;
    let left = modules.iter().zip(tensors.chunks_exact(3)).filter(|(module, _)| module.r > 0);
    let (mut folded, mut ranks) = (Vec::new(), Vec::new());
    for (module, tensors) in left {
        let path = module.site.path(module.layer);
        let change = triplets(tensors).low_rank(1.0)?;
        let a = change.a.affine(scale(spec), 0.0)?;
        for (name, tensor) in [("lora_A", a), ("lora_B", change.b)] {
            let name = format!("base_model.model.{path}.{name}.weight");
            folded.push((name, tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1()?) as Named);
        }
        ranks.push((path, module.r));
    }
    if ranks.is_empty() {
        return Err(MethodError::Unsupported("no module of this adapter has any rank left".into()));
    }
    let lora = LoraSpec {
        r: 1,
        lora_alpha: 1.0,
        lora_dropout: spec.lora_dropout,
        target_modules: Targets::Names(ranks.iter().map(|(path, _)| path.clone()).collect()),
        init_lora_weights: LoraInit::Flag(true),
        alpha_pattern: ranks.iter().map(|(path, r)| (path.clone(), *r as f64)).collect(),
        rank_pattern: ranks.into_iter().collect(),
        ..LoraSpec::default()
    };
    let config = file::config_bytes(&lora::config::write(&lora, base));
    Ok(AdapterFiles { config, weights: file::tensor_bytes(&folded) })
}
