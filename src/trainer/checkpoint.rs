//! What a run needs to go on bit for bit: the adapter in PEFT's files (to serve), `trainer.json`, and
//! `trainer.safetensors` with every variable (`w.`), its moments (`m.`, `v.`) and the method's own state (`s.`).
//! Of moments in 8 bits, the scales of their blocks stand there, and `trainer.bin` has the codes: one variable behind
//! another, `m` before `v`.
//! Order and random numbers are functions of the seed and the step, so the step is the cursor.

use std::borrow::Cow;

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    TrainError,
    optim::{AdamW, BLOCK, Moments},
};
use crate::{
    data::Row,
    domain::{BaseInfo, Metrics, Snapshot, TrainSpec},
    methods::{AdapterFiles, Trainable, file},
};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const STATE: &str = "trainer.json";
const TENSORS: &str = "trainer.safetensors";
const CODES: &str = "trainer.bin";

/// What a run is: a checkpoint belongs to exactly one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// The program's version; another one may do its arithmetic in another order.
    version: String,
    base: String,
    base_hash: String,
    spec: Value,
    /// SHA-256 over the rows in use.
    data: String,
}

impl Identity {
    pub fn new(spec: &TrainSpec, base: &BaseInfo, train: &[&Row], valid: &[&Row]) -> Self {
        let mut hash = Sha256::new();
        for (name, rows) in [(b"t", train), (b"v", valid)] {
            hash.update(name);
            rows.iter().for_each(|row| hash_row(&mut hash, row));
        }
        // Once through text, because what it is compared with went through it.
        let text = serde_json::to_string(spec).unwrap_or_default();
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            base: base.id.clone(),
            base_hash: base.hash.clone(),
            spec: serde_json::from_str(&text).unwrap_or_default(),
            data: hex::encode(hash.finalize()),
        }
    }

    /// The first thing that differs: its name, then its value there and here.
    fn difference(&self, here: &Identity) -> Option<String> {
        let there = [("version", &self.version), ("base", &self.base), ("base's hash", &self.base_hash)];
        let ours = [&here.version, &here.base, &here.base_hash];
        for ((name, there), ours) in there.into_iter().zip(ours) {
            if there != ours {
                return Some(format!("{name} is {there} there and {ours} here"));
            }
        }
        if let Some(path) = differing(&self.spec, &here.spec) {
            let value = |spec: &Value| spec.pointer(&path).unwrap_or(&Value::Null).to_string();
            let name = path.trim_start_matches('/').replace('/', ".");
            return Some(format!("{name} is {} there and {} here", value(&self.spec), value(&here.spec)));
        }
        (self.data != here.data).then(|| "the data differ".to_owned())
    }
}

/// Everything that changes from step to step, besides variables and moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Finished optimiser steps.
    pub step: u64,
    pub total_steps: u64,
    /// The epoch of the last step, from 0, and how many of its rows are done.
    pub epoch: u64,
    pub row: u64,
    pub trained_tokens: u64,
    /// The bits of the least validation loss so far (text would round it), and evaluations since then.
    pub best: Option<u64>,
    pub evaluations_since_best: u64,
    /// The bits of the divergence's weight in the next step, where it may change.
    #[serde(default)]
    pub kl_coef: Option<u64>,
    /// The divergence that ended the run, and the limit that it is above.
    #[serde(default)]
    pub too_far: Option<(f64, f64)>,
    pub metrics: Metrics,
}

#[derive(Serialize, Deserialize)]
struct State {
    identity: Identity,
    progress: Progress,
}

pub fn write(
    identity: &Identity,
    progress: &Progress,
    method: &dyn Trainable,
    variables: &[(String, Var)],
    optimiser: &AdamW,
) -> Result<Snapshot, TrainError> {
    let state = State { identity: identity.clone(), progress: progress.clone() };
    let state = serde_json::to_vec_pretty(&state).map_err(|error| TrainError::Checkpoint(error.to_string()))?;
    let mut tensors: Vec<(String, Vec<usize>, Cow<[f32]>)> = Vec::with_capacity(3 * variables.len());
    let mut codes = Vec::new();
    for ((name, variable), moments) in variables.iter().zip(&optimiser.moments) {
        tensors.push((format!("w.{name}"), variable.dims().to_vec(), variable.flatten_all()?.to_vec1()?.into()));
        let (m, v) = match moments {
            Moments::Full { m, v } => (m, v),
            Moments::Blockwise { m, v } => {
                codes.extend_from_slice(&m.codes);
                codes.extend_from_slice(&v.codes);
                (&m.scales, &v.scales)
            }
        };
        let shape = moments_shape(variable, moments);
        tensors.push((format!("m.{name}"), shape.clone(), m.into()));
        tensors.push((format!("v.{name}"), shape, v.into()));
    }
    tensors.extend(method.state().into_iter().map(|(name, shape, values)| (format!("s.{name}"), shape, values.into())));
    let mut files = adapter(method.export()?);
    files.extend([(STATE.to_owned(), state), (TENSORS.to_owned(), file::tensor_bytes(&tensors))]);
    if !codes.is_empty() {
        files.push((CODES.to_owned(), codes));
    }
    Ok(Snapshot { step: progress.step, files })
}

/// The adapter's own files.
pub fn adapter(files: AdapterFiles) -> Vec<(String, Vec<u8>)> {
    vec![(CONFIG.to_owned(), files.config), (WEIGHTS.to_owned(), files.weights)]
}

/// The shape of `m.` and `v.`: the variable's, or one scale a block.
fn moments_shape(variable: &Var, moments: &Moments) -> Vec<usize> {
    match moments {
        Moments::Full { .. } => variable.dims().to_vec(),
        Moments::Blockwise { .. } => vec![variable.elem_count().div_ceil(BLOCK)],
    }
}

/// The state of a checkpoint that belongs to this run.
pub fn progress(snapshot: &Snapshot, here: &Identity) -> Result<Progress, TrainError> {
    let state: State = serde_json::from_slice(file(snapshot, STATE)?)
        .map_err(|error| TrainError::Checkpoint(format!("{STATE} of the checkpoint: {error}")))?;
    match state.identity.difference(here) {
        Some(difference) => Err(TrainError::Checkpoint(format!("the checkpoint belongs to another run: {difference}"))),
        None if state.progress.step != snapshot.step => Err(TrainError::Checkpoint(format!(
            "the checkpoint is of step {}, not {}",
            state.progress.step, snapshot.step
        ))),
        None => Ok(state.progress),
    }
}

/// Puts variables, moments and the method's state back to where they were.
pub fn restore(
    snapshot: &Snapshot,
    method: &mut dyn Trainable,
    variables: &[(String, Var)],
    optimiser: &mut AdamW,
) -> Result<(), TrainError> {
    let bytes = file(snapshot, TENSORS)?;
    let state = file::shapes(bytes)?.into_iter().filter(|(name, _)| name.starts_with("s."));
    let all = || variables.iter().zip(&optimiser.moments);
    let mut names: Vec<(String, Vec<usize>)> = all()
        .flat_map(|((name, variable), moments)| {
            let shape = moments_shape(variable, moments);
            let of = |kind: &str, shape: Vec<usize>| (format!("{kind}.{name}"), shape);
            [of("w", variable.dims().to_vec()), of("m", shape.clone()), of("v", shape)]
        })
        .collect();
    names.extend(state);
    let is_coded = all().any(|(_, moments)| matches!(moments, Moments::Blockwise { .. }));
    let mut codes = if is_coded { file(snapshot, CODES)? } else { &[] };
    let mut values = file::tensors(bytes, &names)?.into_iter();
    for ((_, variable), moments) in variables.iter().zip(&mut optimiser.moments) {
        let (Some(w), Some(m), Some(v)) = (values.next(), values.next(), values.next()) else { break };
        variable.set(&Tensor::from_vec(w, variable.shape(), variable.device())?)?;
        match moments {
            Moments::Full { m: old_m, v: old_v } => (*old_m, *old_v) = (m, v),
            Moments::Blockwise { m: old_m, v: old_v } => {
                for (old, scales) in [(old_m, m), (old_v, v)] {
                    let own = codes.split_off(..old.codes.len()).ok_or_else(|| short(CODES))?;
                    old.codes.copy_from_slice(own);
                    old.scales = scales;
                }
            }
        }
    }
    if !codes.is_empty() {
        return Err(TrainError::Checkpoint(format!("{CODES} of the checkpoint is {} bytes too long", codes.len())));
    }
    let state = names.drain(3 * variables.len()..).zip(values);
    let state = state.map(|((name, shape), values)| (name["s.".len()..].to_owned(), shape, values));
    Ok(method.restore(state.collect())?)
}

fn short(name: &str) -> TrainError {
    TrainError::Checkpoint(format!("{name} of the checkpoint is too short"))
}

fn file<'a>(snapshot: &'a Snapshot, name: &str) -> Result<&'a [u8], TrainError> {
    let found = snapshot.files.iter().find(|(file, _)| file == name);
    found
        .map(|(_, bytes)| bytes.as_slice())
        .ok_or_else(|| TrainError::Checkpoint(format!("{name} is missing in the checkpoint")))
}

/// The JSON pointer of the first value that differs.
fn differing(a: &Value, b: &Value) -> Option<String> {
    match (a, b) {
        (Value::Object(left), Value::Object(right)) => {
            left.keys().chain(right.keys()).find_map(|key| match (left.get(key), right.get(key)) {
                (Some(a), Some(b)) => differing(a, b).map(|rest| format!("/{key}{rest}")),
                _ => Some(format!("/{key}")),
            })
        }
        (a, b) => (a != b).then(String::new),
    }
}

fn hash_row(hash: &mut Sha256, row: &Row) {
    let said = match row {
        Row::Example(_) => 0.0,
        Row::Pair(pair) => {
            if pair.probability < 1.0 {
                hash.update(pair.probability.to_le_bytes());
            }
            pair.margin
        }
        Row::Judged(judged) => f64::from(u8::from(judged.is_desirable)),
        Row::Prompt(prompt) => {
            hash.update(prompt.item.to_string());
            0.0
        }
        Row::Sampled(sampled) => sampled.advantage,
        Row::Labelled(marked) | Row::Tagged(marked) => {
            for mark in &marked.marks {
                hash.update(format!("{}..{} {}\n", mark.tokens.start, mark.tokens.end, mark.label));
            }
            0.0
        }
    };
    hash.update(said.to_le_bytes());
    for text in row.examples() {
        hash.update((text.ids.len() as u64).to_le_bytes());
        for (id, label) in text.ids.iter().zip(&text.labels) {
            hash.update(id.to_le_bytes());
            hash.update(label.map_or([0xFF; 5], |label| {
                let [a, b, c, d] = label.to_le_bytes();
                [0, a, b, c, d]
            }));
        }
    }
}
