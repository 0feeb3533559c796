//! A score head over any method: one number for a text, read at its last token (PEFT's `SEQ_CLS` files).
//!
//! `score = h w`, `h: (rows, hidden)` the normed hidden rows, `w: (1, hidden)` stored as the tensor `score.weight`
//! beside the method's own. The rest of the files is the method's, unchanged.

mod hook;

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use serde_json::{Map, Value, json};

use super::{AdapterFiles, MethodError, Named, Stepped, Trainable, file};
use crate::{
    domain::rng::Stream,
    model::{Base, Hook},
};
use hook::Scored;

/// The stream of the head's first values in the run's seed.
const HEAD: u64 = 0x5343_4f52;
const TASK: &str = "SEQ_CLS";
/// PEFT names both, whatever the base calls its head.
const MODULES: [&str; 2] = ["classifier", "score"];
/// Under methods that change weights, and under those that only put rows before the text.
const NAMES: [&str; 2] = ["base_model.model.score.weight", "base_model.score.weight"];
const PROMPTS: [&str; 3] = ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"];

/// A method with a score head, while it is trained.
struct Training {
    inner: Box<dyn Trainable>,
    name: &'static str,
    score: Var,
}

/// Whether the files have a score head.
pub fn is_scored(files: &AdapterFiles) -> Result<bool, MethodError> {
    let task: Option<String> = file::field(&file::config(files)?, "task_type")?;
    Ok(task.as_deref() == Some(TASK))
}

/// A fresh head over a method: normal numbers of deviation `1/√(hidden + 1)`, so that first scores are small.
pub fn fresh(inner: Box<dyn Trainable>, base: &Base, seed: u64) -> Result<Box<dyn Trainable>, MethodError> {
    let hidden = base.info.hidden;
    let deviation = 1.0 / (hidden as f32 + 1.0).sqrt();
    let values: Vec<f32> = Stream::new(seed, HEAD).normals(hidden).map(|x| x * deviation).collect();
    let name = name_for(&file::config(&inner.export()?)?);
    over(inner, name, values)
}

/// The method's own files and the head's values, taken apart.
pub struct Parts {
    pub files: AdapterFiles,
    name: &'static str,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// Takes files with a score head apart; none where there is no head.
pub fn split(files: &AdapterFiles) -> Result<Option<Parts>, MethodError> {
    if !is_scored(files)? {
        return Ok(None);
    }
    let mut config = file::config(files)?;
    let name = name_for(&config);
    config.insert("task_type".to_owned(), json!("CAUSAL_LM"));
    if let Some(Value::Array(modules)) = config.get_mut("modules_to_save") {
        modules.retain(|module| !MODULES.iter().any(|ours| module == ours));
    }
    let shapes = file::shapes(&files.weights)?;
    let all = file::tensors(&files.weights, &shapes)?;
    let (head, rest): (Vec<Named>, _) = (shapes.into_iter().zip(all))
        .map(|((name, shape), values)| (name, shape, values))
        .partition(|(found, ..)| found == name);
    let Some((_, shape, values)) = head.into_iter().next() else {
        return Err(MethodError::Mismatch(format!("tensor {name} is missing")));
    };
    let config = serde_json::to_vec(&config).map_err(|error| MethodError::Mismatch(error.to_string()))?;
    Ok(Some(Parts { files: AdapterFiles { config, weights: file::tensor_bytes(&rest) }, name, shape, values }))
}

impl Parts {
    /// A method made of the rest, with its head, to go on training.
    pub fn resume(self, inner: Box<dyn Trainable>, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        self.check(base)?;
        over(inner, self.name, self.values)
    }

    /// The same to serve.
    pub fn load(self, inner: Arc<dyn Hook>, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        self.check(base)?;
        let width = self.values.len();
        Ok(Arc::new(Scored { inner, score: Tensor::from_vec(self.values, (1, width), &Device::Cpu)? }))
    }

    /// One score: heads of several classes are not for us.
    fn check(&self, base: &Base) -> Result<(), MethodError> {
        let (found, wanted) = (&self.shape, [1, base.info.hidden]);
        if *found == wanted {
            return Ok(());
        }
        Err(MethodError::Mismatch(format!("tensor {} has shape {found:?}, not {wanted:?}", self.name)))
    }
}

fn over(inner: Box<dyn Trainable>, name: &'static str, values: Vec<f32>) -> Result<Box<dyn Trainable>, MethodError> {
    let width = values.len();
    let score = Var::from_tensor(&Tensor::from_vec(values, (1, width), &Device::Cpu)?)?;
    Ok(Box::new(Training { inner, name, score }))
}

fn name_for(config: &Map<String, Value>) -> &'static str {
    let is_prompt = config.get("peft_type").and_then(Value::as_str).is_some_and(|name| PROMPTS.contains(&name));
    NAMES[usize::from(is_prompt)]
}

impl Trainable for Training {
    fn hook(&self, train: Option<u64>) -> Result<Arc<dyn Hook>, candle_core::Error> {
        Ok(Arc::new(Scored { inner: self.inner.hook(train)?, score: self.score.as_tensor().clone() }))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        let mut variables = self.inner.variables();
        variables.push((self.name.to_owned(), self.score.clone()));
        variables
    }

    fn rate(&self, name: &str, peak: f64) -> f64 {
        if name == self.name { 1.0 } else { self.inner.rate(name, peak) }
    }

    fn stepped(&mut self, step: &Stepped) -> Result<(), MethodError> {
        let gradients = step.gradients.split_last().map_or(step.gradients, |(_, inner)| inner);
        self.inner.stepped(&Stepped { gradients, ..*step })
    }

    fn state(&self) -> Vec<Named> {
        self.inner.state()
    }

    fn restore(&mut self, state: Vec<Named>) -> Result<(), MethodError> {
        self.inner.restore(state)
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let files = self.inner.export()?;
        let mut config = file::config(&files)?;
        config.insert("task_type".to_owned(), json!(TASK));
        let mut modules: Vec<Value> = MODULES.iter().map(|module| json!(module)).collect();
        if let Some(Value::Array(own)) = config.get("modules_to_save") {
            modules.extend(own.iter().cloned());
        }
        config.insert("modules_to_save".to_owned(), json!(modules));
        let shapes = file::shapes(&files.weights)?;
        let all = file::tensors(&files.weights, &shapes)?;
        let mut tensors: Vec<Named> =
            shapes.into_iter().zip(all).map(|((name, shape), values)| (name, shape, values)).collect();
        tensors.push((self.name.to_owned(), self.score.dims().to_vec(), self.score.flatten_all()?.to_vec1()?));
        let config = config.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        Ok(AdapterFiles { config: file::config_bytes(&config), weights: file::tensor_bytes(&tensors) })
    }
}
