//! DoRA's knobs (Liu et al., arXiv 2402.09353): LoRA's, with the same names and meaning.

use serde::{Deserialize, Serialize};

use super::{Card, Knobs, LoraSpec, SpecError};
use crate::domain::{BaseInfo, Site};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DoraSpec(pub LoraSpec);

impl Knobs for DoraSpec {
    fn aliases() -> super::read::Aliases {
        LoraSpec::aliases()
    }

    fn learning_rate(&self) -> f64 {
        self.0.learning_rate() / 2.0
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        if self.0.is_pissa() {
            let message = "dora cannot begin as pissa: the lengths would be those of the residual";
            return Err(SpecError::new("adapter.init_lora_weights", "spec_conflict", message));
        }
        self.0.check(base)?;
        if self.0.targets(base)?.iter().any(|target| target.site == Site::Embed) {
            let message = "dora changes linears; embed_tokens can be adapted with lora";
            return Err(SpecError::new("adapter.target_modules", "spec_unsupported", message));
        }
        Ok(())
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        let targets = self.0.targets(base).unwrap_or_default();
        self.0.trainable(base) + targets.iter().map(|target| base.shape(target.site).0 as u64).sum::<u64>()
    }

    fn head_field(&self, base: &BaseInfo) -> Option<&'static str> {
        self.0.head_field(base)
    }

    fn card(&self) -> Card {
        Card {
            definition: "LoRA with a trained length m for each row of the changed weights: y = m / ‖W + s·BA‖ · \
                         (W + s·BA) x, the norm held constant in the backward pass (arXiv 2402.09353).",
            choose_when: "The rank has to be low and quality counts more than speed.",
            avoid_when: "Training time counts: a step costs more than LoRA's, with dropout twice the base's work.",
            inference_overhead: "LoRA's, and one multiplication an output; none once merged.",
            mergeable: true,
            file_format: "LORA",
        }
    }
}
