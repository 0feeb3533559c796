//! A model of this server that is asked as a judge, or writes what is judged.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc::Receiver;

use crate::{
    data::{self, Row},
    domain::TaskHead,
    inference::{AdapterRef, EngineError, Handle, Output, Request, Resident, Sampling, Task},
};

/// How long a full queue is left alone.
const PATIENCE: Duration = Duration::from_millis(50);

/// A model and the way to it.
#[derive(Clone)]
pub struct Seat {
    pub(super) engine: Handle,
    pub(super) resident: Resident,
    pub(super) adapter: Option<AdapterRef>,
    pub(super) project: String,
    /// Waits until nothing else does.
    pub(super) is_background: bool,
}

/// A text that a model wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    pub text: String,
    pub tokens: u64,
}

impl Seat {
    /// A conversation up to where the answer begins, as the base's template writes it.
    pub fn prompt(&self, messages: &[Value]) -> Result<Vec<u32>, String> {
        let text = &self.resident.text;
        let id = &self.resident.base.info.id;
        let template = text.template.as_ref().ok_or_else(|| format!("{id} has no chat template"))?;
        let rendered = template.render(messages, None, true).map_err(|error| error.to_string())?;
        text.tokenizer.encode(&rendered, true).map_err(|error| error.to_string())
    }

    /// A text's tokens, with nothing before and after them.
    pub(super) fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
        self.resident.text.tokenizer.encode(text, false).map_err(|error| error.to_string())
    }

    /// An answer of at most so many tokens, or as many as the context has room for.
    pub async fn write(&self, prompt: &[u32], max_tokens: u64, sampling: Sampling) -> Result<Written, String> {
        let most = max_tokens.min(self.room(prompt, 1)?);
        let stop_ids = self.resident.text.stop_ids.clone();
        let request = Request { stop_ids, max_tokens: most as usize, sampling, ..self.request(prompt) };
        let mut outputs = self.submit(request).await?;
        let mut ids = Vec::new();
        loop {
            match heard(&mut outputs).await {
                Some(Output::Token { id, .. }) => ids.push(id),
                Some(Output::Done(_)) => break,
                other => return Err(broken(other)),
            }
        }
        let text = self.resident.text.tokenizer.decode(&ids, true).map_err(|error| error.to_string())?;
        Ok(Written { text, tokens: ids.len() as u64 })
    }

    /// The probability of each token to be the next.
    pub(super) async fn next(&self, prompt: &[u32]) -> Result<Vec<f64>, String> {
        self.room(prompt, 1)?;
        let vocab = self.resident.base.info.vocab;
        let mut outputs = self.submit(Request { logprobs: Some(vocab), ..self.request(prompt) }).await?;
        match heard(&mut outputs).await {
            Some(Output::Token { logprob: Some(found), .. }) => {
                let mut all = vec![0.0; vocab];
                for (id, logprob) in found.top {
                    if let Some(place) = all.get_mut(id as usize) {
                        *place = f64::from(logprob).exp();
                    }
                }
                Ok(all)
            }
            other => Err(broken(other)),
        }
    }

    /// The score that a reward model gives a row of a training file, and the row's tokens.
    pub(super) async fn score(&self, row: &Value) -> Result<(f64, u64), String> {
        let info = &self.resident.base.info;
        let text = &self.resident.text;
        let context = data::Context { text, base_id: &info.id, max_seq_len: info.context, vocab: info.vocab };
        let rows = data::load(row.to_string().as_bytes(), &context).map_err(|error| error.to_string())?;
        let [Row::Example(example)] = rows.as_slice() else { return Err("the row is no conversation".to_owned()) };
        self.room(&example.ids, 0)?;
        let n = example.ids.len();
        let task = Task::Classify { rows: TaskHead::Score.reads(), spans: std::iter::once(n - 1..n).collect() };
        let request = Request { task, max_tokens: 0, ..self.request(&example.ids) };
        match heard(&mut self.submit(request).await?).await {
            Some(Output::Scores { rows, .. }) => match rows.as_slice() {
                [row] if row.len() == 1 => Ok((f64::from(row[0]), n as u64)),
                other => Err(format!("{} scores came of one text", other.len())),
            },
            other => Err(broken(other)),
        }
    }

    /// How many tokens may follow a prompt; fewer than `least` are an error.
    fn room(&self, prompt: &[u32], least: u64) -> Result<u64, String> {
        let taken = self.adapter.as_ref().map_or(0, |adapter| adapter.virtual_tokens);
        let length = prompt.len() + taken;
        let room = (self.resident.base.info.longest(length) as u64).saturating_sub(length as u64);
        if prompt.is_empty() || room < least {
            let (length, most) = (prompt.len(), self.resident.base.info.context);
            return Err(format!("the question has {length} tokens, which the context of {most} has no room for"));
        }
        Ok(room)
    }

    fn request(&self, prompt: &[u32]) -> Request {
        Request {
            base: self.resident.base.info.id.clone(),
            adapter: self.adapter.clone(),
            project: self.project.clone(),
            prompt: prompt.to_vec(),
            max_tokens: 1,
            sampling: Sampling::default(),
            stop_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            task: Task::Complete,
            grammar: None,
            is_background: self.is_background,
            deadline: None,
        }
    }

    async fn submit(&self, request: Request) -> Result<Receiver<Output>, String> {
        loop {
            match self.engine.submit(request.clone()) {
                Err(EngineError::Full { .. }) => tokio::time::sleep(PATIENCE).await,
                other => return other.map_err(|error| error.to_string()),
            }
        }
    }
}

/// What comes next, but for what is said of the prompt.
async fn heard(outputs: &mut Receiver<Output>) -> Option<Output> {
    loop {
        match outputs.recv().await {
            Some(Output::Reused(_) | Output::Prompt(_)) => {}
            other => return other,
        }
    }
}

fn broken(output: Option<Output>) -> String {
    match output {
        Some(Output::Failed(error)) => error.to_string(),
        _ => "the engine ended an answer without a word".to_owned(),
    }
}
