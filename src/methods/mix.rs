//! Several LoRA adapters as one: `ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ`, which is the LoRA of the stacked factors
//! `A = [A₁; A₂; …]`, `B = [w₁s₁B₁, w₂s₂B₂, …]` (PEFT's `add_weighted_adapter`, combination_type `cat`).

use std::{collections::BTreeMap, sync::Arc};

use super::{AdapterFiles, MethodError, as_lora, lora, score, spec_of};
use crate::{
    domain::{MethodSpec, Site},
    model::{Base, Hook, Served},
};

/// The methods whose change is a low-rank matrix beside linears, so that changes can be added.
pub const MIXABLE: [&str; 3] = ["lora", "qlora", "adalora"];

/// Stacked factors of one linear: A by rows; of each adapter B, its rank and its weight.
#[derive(Default)]
struct Stack {
    a: Vec<f32>,
    b: Vec<(Vec<f32>, usize)>,
}

impl Stack {
    /// `(out, r₁ + r₂ + …)`
    fn b(&self, outputs: usize) -> Vec<f32> {
        let rows = (0..outputs)
            .flat_map(|row| self.b.iter().flat_map(move |(b, rank)| b[row * rank..(row + 1) * rank].iter().copied()));
        rows.collect()
    }
}

/// One adapter to serve, made of several with their weights.
pub fn mix(parts: &[(AdapterFiles, f32)], base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
    let mut stacks: BTreeMap<(usize, Site), Stack> = BTreeMap::new();
    for (files, weight) in parts {
        let refused = |why: &str| Err(MethodError::Unsupported(format!("an adapter that {why} cannot be mixed")));
        if score::split(files)?.is_some() {
            return refused("scores texts");
        }
        let spec = spec_of(files)?;
        if !MIXABLE.contains(&spec.type_name()) {
            return refused(&format!("is of method {}", spec.type_name()));
        }
        let folded = as_lora(files, &base.info)?;
        let MethodSpec::Lora(spec) = spec_of(&folded)? else { return refused("is no plain LoRA") };
        let Some(changes) = lora::linears(&spec, &folded, base)? else {
            return refused("changes more than linears of the layers (embeddings, heads, norms or saved modules)");
        };
        for (target, a, b) in changes {
            let stack = stacks.entry((target.layer, target.site)).or_default();
            let factor = weight * target.scale as f32;
            stack.a.extend(a);
            stack.b.push((b.into_iter().map(|x| factor * x).collect(), target.r));
        }
    }
    let mut mixed = Served::new(base.info.layers);
    for ((layer, site), stack) in stacks {
        let (outputs, _) = base.info.shape(site);
        let b = stack.b(outputs);
        mixed.insert(layer, site, base.linear(layer, site).low_rank(stack.a, &b, 1.0));
    }
    Ok(Arc::new(mixed))
}
