//! Scores of texts by an adapter with a score head.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Problem, Service, catalogue::Model, fields::read};
use crate::{
    data,
    inference::{AdapterRef, Output, Request, Sampling, Task},
};

/// Texts of one request.
const MAX_INPUTS: usize = 256;

/// The body of `POST /v1/classify`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    model: String,
    input: Value,
}

/// What came out.
pub struct Scores {
    pub model: String,
    pub scores: Vec<f32>,
    pub prompt_tokens: u64,
}

impl Service {
    /// Reads texts as rows of a training file, so that a score means what it meant in training, and scores each.
    pub async fn classify(&self, project: &str, body: Map<String, Value>) -> Result<Scores, Problem> {
        let body: Body = read(body)?;
        let inputs = match body.input {
            Value::Array(inputs) => inputs,
            one => vec![one],
        };
        if !(1..=MAX_INPUTS).contains(&inputs.len()) {
            let message = format!("input has {} texts; it takes 1 to {MAX_INPUTS}", inputs.len());
            return Err(Problem::invalid("input", "out_of_range", message));
        }
        let model = self.served(project, &body.model).await?;
        if model.adapter.is_none() {
            let message = format!("{} is a base: a reward model gives scores", model.name);
            return Err(Problem::invalid("model", "wrong_task", message));
        }
        let texts = inputs.iter().enumerate().map(|(i, input)| ids(&model, i, input));
        let texts = texts.collect::<Result<Vec<_>, _>>()?;
        let prompt_tokens = texts.iter().map(|text| text.len() as u64).sum();
        let submit = |prompt| {
            let request = Request {
                base: model.resident.base.info.id.clone(),
                adapter: model.adapter.as_ref().map(AdapterRef::from),
                project: project.to_owned(),
                prompt,
                max_tokens: 0,
                sampling: Sampling::default(),
                stop_ids: Vec::new(),
                logprobs: None,
                prompt_logprobs: None,
                task: Task::Score,
                grammar: None,
                is_background: false,
            };
            self.submit(&model, request)
        };
        let mut answers = texts.into_iter().map(submit).collect::<Result<Vec<_>, _>>()?;
        let mut scores = Vec::with_capacity(answers.len());
        for answer in &mut answers {
            let mut output = answer.recv().await;
            if let Some(Output::Reused(_)) = output {
                output = answer.recv().await;
            }
            match output {
                Some(Output::Score(score)) => scores.push(score),
                Some(Output::Failed(error)) => return Err(error.into()),
                _ => return Err(Problem::internal("the engine ended a score without a word")),
            }
        }
        Ok(Scores { model: model.name, scores, prompt_tokens })
    }
}

/// A text's tokens, as a row of a training file has them.
fn ids(model: &Model, index: usize, input: &Value) -> Result<Vec<u32>, Problem> {
    let param = format!("input.{index}");
    let info = &model.resident.base.info;
    let context =
        data::Context { text: &model.resident.text, base_id: &info.id, max_seq_len: info.context, vocab: info.vocab };
    let rows = data::load(input.to_string().as_bytes(), &context).map_err(|error| match error {
        data::DataError::Line(line) => Problem::invalid(&param, &line.code, line.message),
        error => Problem::invalid(&param, "invalid_input", error.to_string()),
    })?;
    let text = match rows.as_slice() {
        [data::Row::Example(text)] => text,
        _ => {
            let message = "a text is an object with messages, or with prompt and completion";
            return Err(Problem::invalid(&param, "invalid_input", message));
        }
    };
    let (length, most) = (text.ids.len() as u64, model.context());
    if length > most {
        let message = format!("{param} has {length} tokens, above the model's context of {most}");
        return Err(Problem::invalid(&param, "context_length_exceeded", message));
    }
    Ok(text.ids.clone())
}
