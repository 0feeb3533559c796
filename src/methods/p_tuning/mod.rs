//! P-tuning: the rows of prompt tuning, made by an encoder while they are trained.
//!
//! Files hold only what the encoder made, as PEFT's do: nobody needs the encoder to serve the rows, and nobody can get
//! it back from them. A finished adapter therefore goes on as plain prompt tuning of these rows (`PROMPT_TUNING`), and
//! a job that continues one says so in its echoed `adapter`. A run that was stopped goes on with its encoder, which
//! is in the trainer's checkpoint.

mod encoder;
mod lstm;

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    AdapterFiles, Method, MethodError, Start, Trainable,
    file::field,
    prompt_tuning::Prompt,
    virtual_tokens::{
        self, Training,
        file::{Layout, tokens},
    },
};
use crate::{
    domain::{PTuningSpec, PromptTuningSpec, spec::Reparameterization},
    model::{Base, Hook},
};
use encoder::PromptEncoder;

/// The spec that the config stands for. Of the knobs of the other encoder PEFT takes no notice.
pub fn spec_of(config: &Map<String, Value>) -> Result<PTuningSpec, MethodError> {
    let encoder = field(config, "encoder_reparameterization_type")?.unwrap_or_default();
    let spec = PTuningSpec {
        num_virtual_tokens: tokens(config)?,
        encoder_reparameterization_type: encoder,
        encoder_hidden_size: field(config, "encoder_hidden_size")?,
        ..PTuningSpec::default()
    };
    Ok(match encoder {
        Reparameterization::Mlp => spec,
        Reparameterization::Lstm => PTuningSpec {
            encoder_num_layers: field(config, "encoder_num_layers")?.unwrap_or(spec.encoder_num_layers),
            encoder_dropout: field(config, "encoder_dropout")?.unwrap_or(spec.encoder_dropout),
            ..spec
        },
    })
}

impl Method for PTuningSpec {
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
        let base = &start.base.info;
        let layout = Layout::embeddings(self.num_virtual_tokens, base);
        let own = [
            ("encoder_dropout", json!(self.encoder_dropout)),
            ("encoder_hidden_size", json!(self.hidden_size(base))),
            ("encoder_num_layers", json!(self.encoder_num_layers)),
            ("encoder_reparameterization_type", json!(self.encoder_reparameterization_type)),
        ];
        let config = layout.config("P_TUNING", base, own);
        let encoder = Box::new(PromptEncoder::new(self, base, start.seed)?);
        Ok(Box::new(Training { encoder, carry: Prompt::carry, layout, config }))
    }

    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        PromptTuningSpec::from(self).resume(files, base)
    }

    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        virtual_tokens::load(files, &Layout::embeddings(self.num_virtual_tokens, &base.info), Prompt::carry)
    }
}
