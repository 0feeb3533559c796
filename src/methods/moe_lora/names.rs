//! The tensors of a mixture under MixLoRA's names.

use crate::{
    domain::{
        BaseInfo, MoeLoraSpec, Site, SpecError,
        spec::{MoeVariant, is_feed_forward},
    },
    methods::part::{Init, Part},
};

/// `mixlora.layers.3.mlp.up_proj`
pub fn module(spec: &MoeLoraSpec, layer: usize, site: Site) -> String {
    format!("{}.layers.{layer}.{}", spec.variant.name(), site.module())
}

/// Where a layer's feed-forward block has its router: `mixlora.layers.3.mlp`.
pub fn block(layer: usize) -> String {
    format!("{}.layers.{layer}.mlp", MoeVariant::MixLora.name())
}

/// `….experts.2`
pub fn expert(module: &str, expert: usize) -> String {
    format!("{module}.experts.{expert}")
}

/// Every tensor, in the order of the forward pass.
pub fn parts(spec: &MoeLoraSpec, base: &BaseInfo) -> Result<Vec<Part>, SpecError> {
    let sites = spec.targets(base)?;
    let blocks = spec.blocks(&sites);
    let mut parts = Vec::new();
    for (layer, site) in sites {
        let ((outputs, inputs), module) = (base.shape(site), module(spec, layer, site));
        let experts = spec.experts(layer, base);
        let mixes = spec.variant != MoeVariant::MixLora || is_feed_forward(site);
        if spec.variant != MoeVariant::MixLora {
            parts.push(router(spec, &module, experts, inputs));
        }
        if spec.variant == MoeVariant::AdaMole {
            let init = Init::Uniform(inputs);
            parts.push(Part::new(format!("{module}.moe_threshold.weight"), [1, inputs], init));
            parts.push(Part::new(format!("{module}.moe_threshold.bias"), [1], init));
        }
        let holders = if mixes { (0..experts).map(|e| expert(&module, e)).collect() } else { vec![module] };
        for holder in holders {
            parts.push(Part::new(format!("{holder}.lora_A.weight"), [spec.r, inputs], Init::Uniform(inputs)));
            parts.push(Part::new(format!("{holder}.lora_B.weight"), [outputs, spec.r], Init::Zero));
        }
    }
    parts.extend(blocks.into_iter().map(|layer| router(spec, &block(layer), spec.experts(layer, base), base.hidden)));
    Ok(parts)
}

fn router(spec: &MoeLoraSpec, module: &str, experts: usize, inputs: usize) -> Part {
    let init = spec.router_init_range.map_or(Init::Uniform(inputs), Init::Normal);
    Part::new(format!("{module}.moe_gate.weight"), [experts, inputs], init)
}
