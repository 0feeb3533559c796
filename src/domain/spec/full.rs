//! Full fine-tuning: every weight of a small dense base, for comparison with the methods that train little.

use serde::{Deserialize, Serialize};

use super::{Card, Knobs, SavedModule, SpecError};
use crate::domain::{BaseInfo, Site};

/// Most weights of a base that is trained whole: sixteen bytes each while AdamW runs, and four in a file that servers
/// hold beside other adapters in a budget of 1 GiB, where nobody said more.
const MOST: u64 = 250_000_000;

/// Storages that hold numbers as they are.
const DENSE: [&str; 3] = ["F32", "F16", "BF16"];

/// Families whose every tensor can be put in place of the base's; the others have norms that cannot.
const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// Without knobs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FullSpec {}

impl Knobs for FullSpec {
    fn learning_rate(&self) -> f64 {
        2e-5
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let unsupported = |message: String| Err(SpecError::new("adapter.type", "spec_unsupported", message));
        let BaseInfo { id, storage, architecture, parameters, .. } = base;
        if !DENSE.contains(&storage.as_str()) {
            let dense = DENSE.join(", ");
            return unsupported(format!(
                "full trains the base's own numbers, which have to be {dense}, and {id} is held as {storage}; \
                 name a dense base, or train lora beside this one"
            ));
        }
        if !FAMILIES.contains(&architecture.as_str()) {
            let families = FAMILIES.join(", ");
            return unsupported(format!("full trains bases of the families {families}, and {id} is {architecture}"));
        }
        if *parameters > MOST {
            return unsupported(format!("{id} has {parameters} weights, above full's limit of {MOST}"));
        }
        Ok(())
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let norms = SavedModule::all(base).filter(|module| matches!(module, SavedModule::Norm(_)));
        let norms: usize = norms.flat_map(|norm| norm.shape(base)).sum();
        // Only Qwen 2 has biases, on these.
        let biased = base.linears().filter(|(_, site)| matches!(site, Site::Q | Site::K | Site::V));
        let biases: usize = match base.architecture.as_str() {
            "qwen2" => biased.map(|(_, site)| base.shape(site).0).sum(),
            _ => 0,
        };
        base.parameters + (norms + biases) as u64
    }

    /// Of a tied base the embedding is trained, whatever stands behind it.
    fn head_field(&self, base: &BaseInfo) -> Option<&'static str> {
        (!base.tied).then_some("type")
    }

    fn card(&self) -> Card {
        Card {
            definition: "Every weight, bias and norm of the base is trained as it is: y = x W'ᵀ, W' begins as W.",
            choose_when: "You want to know what the other methods leave behind, on a small dense base.",
            avoid_when: "There are several adapters to serve: each is a whole model in F32.",
            inference_overhead: "A model of its own: its rows share no product with the base's or other adapters'.",
            mergeable: true,
            file_format: "FULL",
        }
    }
}
