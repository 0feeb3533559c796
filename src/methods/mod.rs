//! Fine-tuning methods: one folder each, beside each other, in PEFT's file format.

pub mod adalora;
mod affine;
mod config;
pub mod dora;
mod dropout;
pub mod file;
pub mod full;
pub mod ia3;
pub mod lora;
pub mod merged;
pub mod mix;
pub mod moe_lora;
pub mod p_tuning;
mod part;
pub mod prefix_tuning;
pub mod prompt_tuning;
mod saved;
pub mod score;
mod top_k;
pub mod unipelt;
pub mod value;
mod variables;
mod virtual_tokens;
pub mod xlora;

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{Tensor, Var};

use crate::{
    domain::{BaseInfo, MethodSpec},
    model::{Base, Hook},
};

use dropout::dropout;
pub use file::{AdapterFiles, MethodError};

/// What a fresh adapter may look at.
pub struct Start<'a> {
    pub base: &'a Base,
    /// All random numbers come from it.
    pub seed: u64,
    /// Optimiser steps of the run.
    pub total_steps: u64,
    /// The adapters that it is made of, for methods that mix others.
    pub experts: &'a [AdapterFiles],
    /// Text to the base's token ids (prompts that begin as words).
    pub tokenize: &'a dyn Fn(&str) -> Result<Vec<u32>, MethodError>,
}

/// What an optimiser step did, for methods that watch it.
pub struct Stepped<'a> {
    /// The step, from 0, and how many there are.
    pub step: u64,
    pub total_steps: u64,
    /// The gradients that the step used, in the order of `variables`.
    pub gradients: &'a [Vec<f32>],
}

/// Named numbers with their shape.
pub type Named = (String, Vec<usize>, Vec<f32>);

/// A method while it is trained.
pub trait Trainable: Send + Sync {
    /// The hook of one forward pass, made anew for each: what is computed from the variables (prompt encoders) is in
    /// that pass's graph. `train` is the key of the pass's random numbers, none while evaluating.
    fn hook(&self, train: Option<u64>) -> Result<Arc<dyn Hook>, candle_core::Error>;

    /// Every trained tensor under a name of its own, in a fixed order; as in the PEFT file where that has it.
    fn variables(&self) -> Vec<(String, Var)>;

    /// The head that says what can still be expected, `(1, hidden)`, where the objective trains one.
    fn value_head(&self) -> Option<&Var> {
        None
    }

    /// A variable's learning rate as a multiple of the run's, which is `peak` before its schedule (LoRA+).
    fn rate(&self, name: &str, peak: f64) -> f64 {
        let _ = (name, peak);
        1.0
    }

    /// Called after each optimiser step (AdaLoRA's budget).
    fn stepped(&mut self, step: &Stepped) -> Result<(), MethodError> {
        let _ = step;
        Ok(())
    }

    /// What has to be remembered besides the variables to go on bit for bit.
    fn state(&self) -> Vec<Named> {
        Vec::new()
    }

    /// Takes back what `state` gave.
    fn restore(&mut self, state: Vec<Named>) -> Result<(), MethodError> {
        match state.first() {
            None => Ok(()),
            Some((name, ..)) => Err(MethodError::Mismatch(format!("the method keeps no state, but there is {name}"))),
        }
    }

    /// The adapter in PEFT's files, without ids and times: the same values give the same bytes.
    fn export(&self) -> Result<AdapterFiles, MethodError>;
}

/// An adapter as a change of the base's stored weights.
pub trait Merge: Send + Sync {
    /// The changed values of a tensor by its Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), none where
    /// it stays as it is. A tied output layer is asked for apart from the embedding.
    fn tensor(&self, name: &str, weight: &Tensor) -> Result<Option<Tensor>, candle_core::Error>;
}

/// What a method's knobs make. Implemented by each spec.
pub trait Method {
    /// A fresh adapter.
    fn create(&self, start: &Start) -> Result<Box<dyn Trainable>, MethodError>;

    /// An adapter to go on training, from its files.
    fn resume(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError>;

    /// An adapter to serve. Every tensor must match a module by name and shape, be finite, and none may be missing.
    fn load(&self, files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError>;

    /// The same change as plain LoRA, in its files.
    fn as_lora(&self, files: &AdapterFiles, base: &BaseInfo) -> Result<AdapterFiles, MethodError> {
        _ = (files, base);
        Err(MethodError::Unsupported("this method's change is not a low-rank matrix beside each linear".into()))
    }

    /// The adapter as a change of weights, for methods that are one.
    fn merge(&self, files: &AdapterFiles, base: &Base) -> Result<Box<dyn Merge>, MethodError> {
        let _ = (files, base);
        Err(MethodError::Unsupported("an adapter of this method is no change of the base's weights".into()))
    }
}

fn of(spec: &MethodSpec) -> &dyn Method {
    match spec {
        MethodSpec::Lora(spec) => spec,
        MethodSpec::Dora(spec) => spec,
        MethodSpec::PromptTuning(spec) => spec,
        MethodSpec::PTuning(spec) => spec,
        MethodSpec::PrefixTuning(spec) => spec,
        MethodSpec::PTuningV2(spec) => spec,
        MethodSpec::MoeLora(spec) => spec,
        MethodSpec::Unipelt(spec) => spec,
        MethodSpec::AdaLora(spec) => spec,
        MethodSpec::Ia3(spec) => spec,
        MethodSpec::Xlora(spec) => spec,
        MethodSpec::Full(spec) => spec,
        // The same arithmetic and files: what is under it does not matter.
        MethodSpec::Qlora(spec) => &spec.lora,
    }
}

pub fn create(spec: &MethodSpec, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
    of(spec).create(start)
}

/// An adapter to go on training, from its files, with its head if it has one.
pub fn resume(files: &AdapterFiles, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
    match score::split(files)? {
        Some(parts) => {
            let inner = of(&spec_of(&parts.files)?).resume(&parts.files, base)?;
            parts.resume(inner, base)
        }
        None => of(&writer_of(files)?).resume(files, base),
    }
}

/// An adapter to serve, from its files, with its head if it has one.
pub fn load(files: &AdapterFiles, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
    match score::split(files)? {
        Some(parts) => {
            let inner = of(&spec_of(&parts.files)?).load(&parts.files, base)?;
            parts.load(inner, base)
        }
        None => of(&writer_of(files)?).load(files, base),
    }
}

/// The spec of files without a head, which have to be able to write.
fn writer_of(files: &AdapterFiles) -> Result<MethodSpec, MethodError> {
    let spec = spec_of(files)?;
    match spec.sees_ahead() {
        None => Ok(spec),
        Some(field) => Err(MethodError::Unsupported(format!(
            "adapter_config.json: {field} lets a token see those behind it, so that the adapter needs a head of its own \
             (task_type SEQ_CLS or TOKEN_CLS)"
        ))),
    }
}

/// The adapter as plain LoRA, where its method's change is one.
pub fn as_lora(files: &AdapterFiles, base: &BaseInfo) -> Result<AdapterFiles, MethodError> {
    of(&spec_of(files)?).as_lora(files, base)
}

/// The adapter as llama.cpp's adapter file, where its method's change is plain LoRA.
pub fn as_gguf(files: &AdapterFiles, base: &Base) -> Result<Vec<u8>, MethodError> {
    if score::split(files)?.is_some() {
        return Err(MethodError::Unsupported("llama.cpp's adapters have no head of their own".into()));
    }
    let files = as_lora(files, &base.info)?;
    match spec_of(&files)? {
        MethodSpec::Lora(spec) => lora::gguf::write(&spec, &files, base),
        _ => Err(MethodError::Unsupported("the adapter is no plain LoRA".into())),
    }
}

/// The files of AdapterHub's directory of an adapter, by their paths in it, for the methods that PEFT does not have.
pub fn as_adapterhub(files: &AdapterFiles, base: &BaseInfo) -> Result<Vec<(String, Vec<u8>)>, MethodError> {
    match spec_of(files)? {
        MethodSpec::Unipelt(spec) => unipelt::as_adapterhub(&spec, score::split(files)?, base),
        spec => {
            let name = spec.type_name();
            Err(MethodError::Unsupported(format!("AdapterHub's files are written for unipelt, and this is {name}")))
        }
    }
}

/// An adapter as a change of the base's weights, from its files.
pub fn merge(files: &AdapterFiles, base: &Base) -> Result<Box<dyn Merge>, MethodError> {
    if score::split(files)?.is_some() {
        return Err(MethodError::Unsupported(
            "an adapter with a head of its own is no language model once merged".into(),
        ));
    }
    of(&spec_of(files)?).merge(files, base)
}

/// The spec that a PEFT config stands for (for jobs that continue an adapter, and for import).
pub fn spec_of(files: &AdapterFiles) -> Result<MethodSpec, MethodError> {
    if let Some(parts) = score::split(files)? {
        return spec_of(&parts.files);
    }
    let config = file::config(files)?;
    match config.get("peft_type").and_then(|value| value.as_str()) {
        Some("PROMPT_TUNING") => Ok(MethodSpec::PromptTuning(prompt_tuning::spec_of(&config)?)),
        Some("LORA") => lora::spec_of(&config, files),
        Some("P_TUNING") => Ok(MethodSpec::PTuning(p_tuning::spec_of(&config)?)),
        Some("PREFIX_TUNING") => Ok(MethodSpec::PrefixTuning(prefix_tuning::spec_of(&config)?)),
        Some("ADALORA") => Ok(MethodSpec::AdaLora(adalora::spec_of(&config)?)),
        Some("IA3") => Ok(MethodSpec::Ia3(ia3::spec_of(&config)?)),
        Some("XLORA") => Ok(MethodSpec::Xlora(xlora::spec_of(&config)?)),
        Some("FULL") => Ok(MethodSpec::Full(full::spec_of(&config)?)),
        Some("UNIPELT") => Ok(MethodSpec::Unipelt(unipelt::spec_of(&config)?)),
        Some(other) => match moe_lora::variant(other) {
            Some(variant) => Ok(MethodSpec::MoeLora(moe_lora::spec_of(variant, &config)?)),
            None => Err(MethodError::Unsupported(format!("adapter_config.json: peft_type {other} is not supported"))),
        },
        None => Err(MethodError::Mismatch("adapter_config.json: peft_type is missing".into())),
    }
}

/// The files of PEFT's directory of an adapter, by their paths in it.
pub fn directory(files: AdapterFiles) -> Result<Vec<(String, Vec<u8>)>, MethodError> {
    match xlora::directory::is_xlora(&file::config(&files)?) {
        true => xlora::directory::write(&files),
        false => Ok(vec![(file::CONFIG.to_owned(), files.config), (file::WEIGHTS.to_owned(), files.weights)]),
    }
}

/// An adapter of the files in PEFT's directory, by their paths in it.
pub fn of_directory(entries: Vec<(String, Vec<u8>)>) -> Result<AdapterFiles, MethodError> {
    let mut folders = BTreeMap::<String, AdapterFiles>::new();
    for (path, bytes) in entries {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", &path));
        let files = folders.entry(folder.to_owned()).or_default();
        match name {
            file::CONFIG => files.config = bytes,
            file::WEIGHTS => files.weights = bytes,
            _ => {}
        }
    }
    let top = folders.remove("").unwrap_or_default();
    let inner: Vec<(String, AdapterFiles)> = folders.into_iter().collect();
    match (xlora::directory::is_xlora(&file::config(&top)?), inner.first()) {
        (true, _) => xlora::directory::read(top, inner),
        (false, None) => Ok(top),
        (false, Some((folder, _))) => {
            let message =
                format!("{} is there twice, at the top and in {folder}: an archive holds one adapter", file::CONFIG);
            Err(MethodError::Mismatch(message))
        }
    }
}

/// What a job trains that continues an adapter. Of encoders only the product is stored: such adapters go on as the plain
/// rows that it is.
pub fn continued(files: &AdapterFiles) -> Result<MethodSpec, MethodError> {
    Ok(match spec_of(files)? {
        MethodSpec::PTuning(spec) => MethodSpec::PromptTuning((&spec).into()),
        MethodSpec::PrefixTuning(spec) => MethodSpec::PrefixTuning(spec.flat()),
        spec => spec,
    })
}
