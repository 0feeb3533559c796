//! QLoRA's knobs (Dettmers et al., arXiv 2305.14314): LoRA's, over a base that is held in 4 bits.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Card, Knobs, LoraSpec, MethodSpec, SpecError, read};
use crate::domain::BaseInfo;

/// Ways to hold a base in 4 bits: bitsandbytes' and llama.cpp's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantType {
    Nf4,
    #[serde(rename = "q4_0")]
    Q40,
    #[serde(rename = "q4_1")]
    Q41,
    #[serde(rename = "q4_k")]
    Q4K,
}

/// What the request says of its base; nothing takes the base as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quantization {
    pub quant_type: Option<QuantType>,
    /// Whether the scales of NF4 are quantised too.
    pub double_quant: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct QloraSpec {
    #[serde(flatten)]
    pub lora: LoraSpec,
    #[serde(flatten)]
    pub quantization: Quantization,
}

/// Reads a request's object. A flattened struct loses the name of a field with a wrong type, so each half is read by
/// itself.
pub(super) fn read(value: &Value) -> Result<MethodSpec, SpecError> {
    let mut lora = read::named::<QloraSpec>(value, "adapter", QloraSpec::aliases(), "type")?;
    let mut own = serde_json::Map::new();
    for key in ["quant_type", "double_quant"] {
        own.extend(lora.remove_entry(key));
    }
    let (lora, quantization) = (read::typed(lora, "adapter")?, read::typed(own, "adapter")?);
    Ok(MethodSpec::Qlora(QloraSpec { lora, quantization }))
}

/// How a base is held, if in 4 bits.
fn held(base: &BaseInfo) -> Option<(QuantType, bool)> {
    match base.storage.as_str() {
        "NF4" => Some((QuantType::Nf4, false)),
        "NF4-DQ" => Some((QuantType::Nf4, true)),
        "Q4_0" => Some((QuantType::Q40, false)),
        "Q4_1" => Some((QuantType::Q41, false)),
        "Q4_K" => Some((QuantType::Q4K, false)),
        _ => None,
    }
}

impl Quantization {
    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        let (id, storage) = (&base.id, &base.storage);
        let twin = format!("a server started with --model {id}-nf4=nf4:SOURCE (nf4-dq: with double_quant) has one");
        let Some((quant_type, double_quant)) = held(base) else {
            let message = format!("qlora needs a base in 4 bits, and {id} is held as {storage}; {twin}");
            return Err(SpecError::new("adapter.type", "spec_unsupported", message));
        };
        let differs = |field: &str| {
            let param = read::join("adapter", field);
            let message = format!("{param} is not how {id} is held, which is {storage}; leave it out, or {twin}");
            Err(SpecError::new(param, "spec_conflict", message))
        };
        if self.quant_type.is_some_and(|asked| asked != quant_type) {
            return differs("quant_type");
        }
        if self.double_quant.is_some_and(|asked| asked != double_quant) {
            return differs("double_quant");
        }
        Ok(())
    }
}

impl Knobs for QloraSpec {
    fn aliases() -> read::Aliases {
        LoraSpec::aliases()
    }

    fn learning_rate(&self) -> f64 {
        2e-4
    }

    fn check(&self, base: &BaseInfo) -> Result<(), SpecError> {
        self.quantization.check(base)?;
        self.lora.check(base)
    }

    fn trainable(&self, base: &BaseInfo) -> u64 {
        self.lora.trainable(base)
    }

    fn head_field(&self, base: &BaseInfo) -> Option<&'static str> {
        self.lora.head_field(base)
    }

    fn card(&self) -> Card {
        Card {
            definition: "LoRA on every linear of a frozen base in 4 bits, NF4 or a GGUF Q4 format: \
                         y = x deq(W)ᵀ + (alpha / r) · (x Aᵀ) Bᵀ (arXiv 2305.14314).",
            choose_when: "The base would not fit in memory otherwise. With all linears adapted the rank matters little.",
            avoid_when: "The base fits as it is: 4 bits cost some of its quality.",
            inference_overhead: "LoRA's, over the base in 4 bits that it was trained on.",
            mergeable: true,
            file_format: "LORA",
        }
    }
}
