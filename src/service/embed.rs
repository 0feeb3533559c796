//! Texts as vectors: pooled hidden states.

use super::{Problem, Service, catalogue::Model};
use crate::inference::{AdapterRef, Output, Pooling, Request, Sampling, Task};

/// One vector.
pub struct Embedded {
    /// Of length 1.
    pub vector: Vec<f32>,
    pub tokens: u64,
}

/// What to embed.
pub struct ToEmbed<'a> {
    pub model: &'a Model,
    pub project: &'a str,
    pub inputs: Vec<Vec<u32>>,
    pub pooling: Pooling,
    /// Keeps the first so many numbers.
    pub dimensions: Option<u64>,
    /// Waits until nothing else does.
    pub is_background: bool,
}

impl Service {
    /// A vector for each input, in order. Inputs are read side by side with whatever the engine does.
    pub async fn embed(&self, wanted: ToEmbed<'_>) -> Result<Vec<Embedded>, Problem> {
        let info = &wanted.model.resident.base.info;
        let width = wanted
            .dimensions
            .map_or(Ok(info.hidden as u64), |n| super::fields::in_range("dimensions", n, 1, info.hidden as u64))?;
        for input in &wanted.inputs {
            super::generate::check_prompt(wanted.model, input, "input")?;
        }
        let mut receivers = Vec::new();
        for input in &wanted.inputs {
            let request = Request {
                base: info.id.clone(),
                adapter: wanted.model.adapter.as_ref().map(AdapterRef::from),
                project: wanted.project.to_owned(),
                prompt: input.clone(),
                max_tokens: 0,
                sampling: Sampling::default(),
                stop_ids: Vec::new(),
                logprobs: None,
                prompt_logprobs: None,
                grammar: None,
                task: Task::Embed(wanted.pooling),
                is_background: wanted.is_background,
                deadline: None,
            };
            receivers.push(self.submit(wanted.model, request)?);
        }
        let mut all = Vec::new();
        for (mut receiver, input) in receivers.into_iter().zip(&wanted.inputs) {
            let vector = match receiver.recv().await {
                Some(Output::Embedding(vector)) => vector,
                Some(Output::Failed(error)) => return Err(error.into()),
                _ => return Err(Problem::internal("the engine gave no embedding")),
            };
            all.push(Embedded { vector: shortened(vector, width as usize), tokens: input.len() as u64 });
        }
        Ok(all)
    }
}

/// The first `n` numbers, of length 1.
fn shortened(mut vector: Vec<f32>, n: usize) -> Vec<f32> {
    vector.truncate(n);
    let length = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    vector
}
