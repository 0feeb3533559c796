//! A head of its own over any method: scores of a text, or of each word (PEFT's `SEQ_CLS` and `TOKEN_CLS` files).
//!
//! `scores = h Wᵀ (+ b)`, `h: (rows, hidden)` the normed hidden rows, `W: (labels, hidden)` and `b: (labels)` stored as
//! `score.weight` and `score.bias` beside the method's own tensors. Hugging Face's heads of texts have no bias, those
//! of tokens have one. The labels' names stand in the config as `id2label`, a key that PEFT passes over; the rest of
//! the files is the method's, unchanged.

mod hook;

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use serde_json::{Map, Value, json};

use super::{AdapterFiles, MethodError, Named, Stepped, Trainable, file};
use crate::{
    domain::{TaskHead, WordToken, rng::Stream},
    model::{Base, Hook},
};
use hook::Scored;

/// The stream of the head's first values in the run's seed.
const HEAD: u64 = 0x5343_4f52;
/// PEFT names both, whatever the base calls its head.
const MODULES: [&str; 2] = ["classifier", "score"];
/// Methods that only put rows before the text have a name less in their paths.
const PROMPTS: [&str; 3] = ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"];

/// A method with a head, while it is trained.
struct Training {
    inner: Box<dyn Trainable>,
    head: Arc<TaskHead>,
    /// The head's tensors by their names in files: the weight, and the bias if there is one.
    variables: Vec<(String, Var)>,
}

/// The head that the files have, if any.
pub fn head(files: &AdapterFiles) -> Result<Option<TaskHead>, MethodError> {
    Ok(split(files)?.map(|parts| parts.head))
}

/// A fresh head over a method: normal numbers of deviation `1/√(hidden + 1)`, so that first scores are small.
pub fn fresh(
    inner: Box<dyn Trainable>,
    head: TaskHead,
    base: &Base,
    seed: u64,
) -> Result<Box<dyn Trainable>, MethodError> {
    let (width, hidden) = (head.width(), base.info.hidden);
    let deviation = 1.0 / (hidden as f32 + 1.0).sqrt();
    let values: Vec<f32> = Stream::new(seed, HEAD).normals(width * hidden).map(|x| x * deviation).collect();
    let module = format!("{}score", prefix(&file::config(&inner.export()?)?));
    let mut tensors = vec![(format!("{module}.weight"), vec![width, hidden], values)];
    if head.has_bias() {
        tensors.push((format!("{module}.bias"), vec![width], vec![0.0; width]));
    }
    over(inner, head, tensors)
}

/// The method's own files and the head, taken apart.
pub struct Parts {
    pub files: AdapterFiles,
    pub head: TaskHead,
    /// The weight, and the bias if there is one.
    pub tensors: Vec<Named>,
}

/// Takes files with a head apart; none where there is no head.
pub fn split(files: &AdapterFiles) -> Result<Option<Parts>, MethodError> {
    let mut config = file::config(files)?;
    let task: Option<String> = file::field(&config, "task_type")?;
    let is_of_tokens = match task.as_deref() {
        Some("SEQ_CLS") => false,
        Some("TOKEN_CLS") => true,
        _ => return Ok(None),
    };
    let prefix = prefix(&config);
    let shapes = file::shapes(&files.weights)?;
    let all = file::tensors(&files.weights, &shapes)?;
    let names = MODULES.map(|module| ["weight", "bias"].map(|kind| format!("{prefix}{module}.{kind}")));
    let (mut tensors, rest): (Vec<Named>, _) = (shapes.into_iter().zip(all))
        .map(|((name, shape), values)| (name, shape, values))
        .partition(|(found, ..)| names.iter().flatten().any(|name| name == found));
    // The weight first; of one module.
    tensors.sort_by_key(|(name, ..)| names.iter().flatten().position(|known| known == name));
    let Some((first, shape, _)) = tensors.first().filter(|(name, ..)| name.ends_with(".weight")) else {
        return Err(MethodError::Mismatch(format!("tensor {prefix}score.weight is missing")));
    };
    let module = first.trim_end_matches("weight");
    if let Some((name, ..)) = tensors.iter().find(|(name, ..)| !name.starts_with(module)) {
        return Err(MethodError::Mismatch(format!("tensors {first} and {name} are two heads")));
    }
    let labels = labels(&config, shape.first().copied().unwrap_or(0))?;
    let head = match (is_of_tokens, labels) {
        (true, labels) => {
            // Hugging Face's recipes tag a word at its first token; ours say where.
            let word_token = file::field(&config, "word_token")?.unwrap_or(WordToken::First);
            TaskHead::Token { labels, word_token }
        }
        (false, labels) if labels.len() == 1 => TaskHead::Score,
        (false, labels) => TaskHead::Sequence { labels },
    };
    ["id2label", "word_token"].iter().for_each(|key| _ = config.shift_remove(*key));
    config.insert("task_type".to_owned(), json!("CAUSAL_LM"));
    if let Some(Value::Array(modules)) = config.get_mut("modules_to_save") {
        modules.retain(|module| !MODULES.iter().any(|ours| module == ours));
    }
    let config = serde_json::to_vec(&config).map_err(|error| MethodError::Mismatch(error.to_string()))?;
    Ok(Some(Parts { files: AdapterFiles { config, weights: file::tensor_bytes(&rest) }, head, tensors }))
}

/// The names in `id2label`, a key a row; Hugging Face's where the file has none.
fn labels(config: &Map<String, Value>, width: usize) -> Result<Vec<String>, MethodError> {
    let Some(Value::Object(named)) = config.get("id2label").filter(|value| !value.is_null()) else {
        return Ok((0..width).map(|i| format!("LABEL_{i}")).collect());
    };
    let name = |i: usize| named.get(&i.to_string()).and_then(Value::as_str).map(str::to_owned);
    let names: Option<Vec<String>> = (0..width).map(name).collect();
    let fits = |names: &Vec<String>| {
        named.len() == width && names.iter().enumerate().all(|(i, name)| !names[..i].contains(name))
    };
    names.filter(fits).ok_or_else(|| {
        let message =
            format!("adapter_config.json: id2label is not a name of its own for each of the head's {width} rows");
        MethodError::Mismatch(message)
    })
}

impl Parts {
    /// A method made of the rest, with its head, to go on training.
    pub fn resume(self, inner: Box<dyn Trainable>, base: &Base) -> Result<Box<dyn Trainable>, MethodError> {
        self.check(base)?;
        over(inner, self.head, self.tensors)
    }

    /// The same to serve.
    pub fn load(self, inner: Arc<dyn Hook>, base: &Base) -> Result<Arc<dyn Hook>, MethodError> {
        self.check(base)?;
        let tensors = self.tensors.into_iter().map(|(_, shape, values)| Tensor::from_vec(values, shape, &Device::Cpu));
        let mut tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let bias = if tensors.len() > 1 { tensors.pop() } else { None };
        let Some(weight) = tensors.pop() else {
            return Err(MethodError::Mismatch("the head has no weight".to_owned()));
        };
        Ok(Arc::new(Scored { inner, head: Arc::new(self.head), weight, bias }))
    }

    fn check(&self, base: &Base) -> Result<(), MethodError> {
        let width = self.head.width();
        let wanted = [vec![width, base.info.hidden], vec![width]];
        for ((name, found, _), wanted) in self.tensors.iter().zip(wanted) {
            if *found != wanted {
                return Err(MethodError::Mismatch(format!("tensor {name} has shape {found:?}, not {wanted:?}")));
            }
        }
        Ok(())
    }
}

fn over(inner: Box<dyn Trainable>, head: TaskHead, tensors: Vec<Named>) -> Result<Box<dyn Trainable>, MethodError> {
    let (names, values) = tensors.into_iter().map(|(name, shape, values)| ((name, shape), values)).unzip();
    Ok(Box::new(Training { inner, head: Arc::new(head), variables: file::variables(names, values)? }))
}

/// What stands before the head's name.
fn prefix(config: &Map<String, Value>) -> &'static str {
    let is_prompt = config.get("peft_type").and_then(Value::as_str).is_some_and(|name| PROMPTS.contains(&name));
    if is_prompt { "base_model." } else { "base_model.model." }
}

impl Trainable for Training {
    fn hook(&self, train: Option<u64>) -> Result<Arc<dyn Hook>, candle_core::Error> {
        let mut tensors = self.variables.iter().map(|(_, variable)| variable.as_tensor().clone());
        let (Some(weight), bias) = (tensors.next(), tensors.next()) else {
            candle_core::bail!("the head has no weight")
        };
        Ok(Arc::new(Scored { inner: self.inner.hook(train)?, head: self.head.clone(), weight, bias }))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        let mut variables = self.inner.variables();
        variables.extend(self.variables.iter().cloned());
        variables
    }

    fn rate(&self, name: &str, peak: f64) -> f64 {
        let is_own = self.variables.iter().any(|(own, _)| own == name);
        if is_own { 1.0 } else { self.inner.rate(name, peak) }
    }

    fn stepped(&mut self, step: &Stepped) -> Result<(), MethodError> {
        let inner = step.gradients.len().saturating_sub(self.variables.len());
        self.inner.stepped(&Stepped { gradients: &step.gradients[..inner], ..*step })
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
        config.insert("task_type".to_owned(), json!(self.head.task_type()));
        let mut modules: Vec<Value> = MODULES.iter().map(|module| json!(module)).collect();
        if let Some(Value::Array(own)) = config.get("modules_to_save") {
            modules.extend(own.iter().cloned());
        }
        config.insert("modules_to_save".to_owned(), json!(modules));
        let labels = self.head.labels();
        if !labels.is_empty() {
            let named: Map<String, Value> =
                labels.iter().enumerate().map(|(i, label)| (i.to_string(), json!(label))).collect();
            config.insert("id2label".to_owned(), Value::Object(named));
        }
        if let TaskHead::Token { word_token, .. } = self.head.as_ref() {
            config.insert("word_token".to_owned(), json!(word_token));
        }
        let shapes = file::shapes(&files.weights)?;
        let all = file::tensors(&files.weights, &shapes)?;
        let mut tensors: Vec<Named> =
            shapes.into_iter().zip(all).map(|((name, shape), values)| (name, shape, values)).collect();
        for (name, variable) in &self.variables {
            tensors.push((name.clone(), variable.dims().to_vec(), variable.flatten_all()?.to_vec1()?));
        }
        let config = config.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        Ok(AdapterFiles { config: file::config_bytes(&config), weights: file::tensor_bytes(&tensors) })
    }
}
