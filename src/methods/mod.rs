//! Fine-tuning methods: one folder each, beside each other, in PEFT's file format.

pub mod file;
pub mod lora;

use std::sync::Arc;

use candle_core::Var;

use crate::{
    domain::{BaseInfo, MethodSpec},
    model::Hook,
};

pub use file::{AdapterFiles, MethodError};

/// A method while it is trained.
pub trait Trainable: Send + Sync {
    /// The hook that the model's forward takes; it reads the variables as they are now.
    fn hook(&self) -> Arc<dyn Hook>;

    /// Every trained tensor by its name in the PEFT file, in a fixed order.
    fn variables(&self) -> Vec<(String, Var)>;

    /// Whether weight decay applies to a variable (never to IA3 vectors, DoRA magnitudes, prompts, gates).
    fn decays(&self, name: &str) -> bool {
        let _ = name;
        true
    }

    /// The adapter in PEFT's files, without ids and times: the same values give the same bytes.
    fn export(&self) -> Result<AdapterFiles, MethodError>;
}

/// A fresh adapter. Random numbers come from `seed` alone.
pub fn create(spec: &MethodSpec, base: &BaseInfo, seed: u64) -> Result<Box<dyn Trainable>, MethodError> {
    match spec {
        MethodSpec::Lora(spec) => lora::create(spec, base, seed),
    }
}

/// An adapter to go on training, from its files.
pub fn resume(files: &AdapterFiles, base: &BaseInfo) -> Result<Box<dyn Trainable>, MethodError> {
    match spec_of(files)? {
        MethodSpec::Lora(spec) => lora::resume(&spec, files, base),
    }
}

/// An adapter to serve. Every tensor must match a module by name and shape, be finite, and none may be missing.
pub fn load(files: &AdapterFiles, base: &BaseInfo) -> Result<Arc<dyn Hook>, MethodError> {
    match spec_of(files)? {
        MethodSpec::Lora(spec) => lora::load(&spec, files, base),
    }
}

/// The spec that a PEFT config stands for (for jobs that continue an adapter, and for import).
pub fn spec_of(files: &AdapterFiles) -> Result<MethodSpec, MethodError> {
    let config = file::config(files)?;
    match config.get("peft_type").and_then(|value| value.as_str()) {
        Some("LORA") => Ok(MethodSpec::Lora(lora::spec_of(&config)?)),
        Some(other) => {
            Err(MethodError::Unsupported(format!("adapter_config.json: peft_type {other} is not supported")))
        }
        None => Err(MethodError::Mismatch("adapter_config.json: peft_type is missing".into())),
    }
}
