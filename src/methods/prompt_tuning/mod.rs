//! Prompt tuning: trained embeddings before the text, and nothing else.

mod layer;

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    AdapterFiles, Method, MethodError, Start, Trainable,
    file::field,
    virtual_tokens::{
        self, Plain, Training,
        file::{Layout, tokens},
    },
};
use crate::{
    domain::{BaseInfo, PromptTuningSpec, rng::Stream, spec::PromptInit},
    model::{Base, Hook},
};

pub use layer::Prompt;

/// The spec that the config stands for; PEFT's default init is RANDOM.
pub fn spec_of(config: &Map<String, Value>) -> Result<PromptTuningSpec, MethodError> {
    let init = field(config, "prompt_tuning_init")?.unwrap_or(PromptInit::Random);
    let text: Option<String> = field(config, "prompt_tuning_init_text")?;
    Ok(PromptTuningSpec {
        num_virtual_tokens: tokens(config)?,
        prompt_tuning_init: init,
        // PEFT keeps a text that it did not read.
        prompt_tuning_init_text: text.filter(|_| init == PromptInit::Text),
    })
}

impl Method for PromptTuningSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        train(self, &start.base.info, first(self, start)?)
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        train(self, &base.info, layout(self, &base.info).read(files)?)
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        virtual_tokens::load(files, &layout(self, &base.info), Prompt::carry)
    }
}

fn layout(spec: &PromptTuningSpec, base: &BaseInfo) -> Layout {
    Layout::embeddings(spec.num_virtual_tokens, base)
}

fn train(spec: &PromptTuningSpec, base: &BaseInfo, values: Vec<f32>) -> Result<Box<dyn Trainable>, MethodError> {
    let layout = layout(spec, base);
    let own = [
        ("prompt_tuning_init", json!(spec.prompt_tuning_init)),
        ("prompt_tuning_init_text", json!(spec.prompt_tuning_init_text)),
        ("tokenizer_kwargs", Value::Null),
        // PEFT wants it beside a text, also when it only reads the result.
        ("tokenizer_name_or_path", spec.prompt_tuning_init_text.as_ref().map_or(Value::Null, |_| json!(base.id))),
    ];
    let config = layout.config("PROMPT_TUNING", base, own);
    let encoder = Box::new(Plain::new(values, &layout)?);
    Ok(Box::new(Training { encoder, carry: Prompt::carry, layout, config }))
}

/// The first rows, one behind another.
fn first(spec: &PromptTuningSpec, start: &Start) -> Result<Vec<f32>, MethodError> {
    let (base, p) = (start.base, spec.num_virtual_tokens);
    let ids = match (spec.prompt_tuning_init, &spec.prompt_tuning_init_text) {
        (PromptInit::Random, _) => return Ok(Stream::new(start.seed, 0).normals(p * base.info.hidden).collect()),
        (PromptInit::Text, Some(text)) => {
            let ids = (start.tokenize)(text)?;
            if ids.is_empty() {
                return Err(MethodError::Mismatch("prompt_tuning_init_text has no tokens".into()));
            }
            ids.iter().copied().cycle().take(p).collect()
        }
        _ => virtual_tokens::sample(start, p),
    };
    Ok(base.embed(&ids)?.flatten_all()?.to_vec1()?)
}
