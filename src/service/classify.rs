//! What adapters with a head of their own say of texts: a score, a label, or a tag for each word.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{Problem, Service, catalogue::Model, fields::read};
use crate::{
    data::{self, Reading},
    domain::TaskHead,
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
pub struct Classified {
    pub model: String,
    pub texts: Vec<Said>,
    pub prompt_tokens: u64,
}

/// A label and how likely it is.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct LabelProbability {
    pub label: String,
    /// 0 to 1; those of all labels sum to 1.
    pub probability: f64,
}

/// What is said of a text.
pub enum Said {
    Score(f32),
    /// Every label, the likeliest first.
    Labels(Vec<LabelProbability>),
    /// The likeliest tag of each word, and how likely it is.
    Tags(Vec<LabelProbability>),
}

impl Service {
    /// Reads texts as rows of a training file, so that an answer means what it meant in training, and asks of each.
    pub async fn classify(&self, project: &str, body: Map<String, Value>) -> Result<Classified, Problem> {
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
            let message = format!("{} is a base: reward models give scores, and classifiers labels", model.name);
            return Err(Problem::invalid("model", "wrong_task", message));
        }
        let texts = inputs.into_iter().enumerate().map(|(i, input)| reading(&model, i, input));
        let texts = texts.collect::<Result<Vec<_>, _>>()?;
        let prompt_tokens = texts.iter().map(|text| text.ids.len() as u64).sum();
        let submit = |text: Reading| {
            let request = Request {
                base: model.resident.base.info.id.clone(),
                adapter: model.adapter.as_ref().map(AdapterRef::from),
                project: project.to_owned(),
                prompt: text.ids,
                max_tokens: 0,
                sampling: Sampling::default(),
                stop_ids: Vec::new(),
                logprobs: None,
                prompt_logprobs: None,
                task: Task::Classify { rows: text.kind, spans: text.spans },
                grammar: None,
                is_background: false,
                deadline: None,
            };
            self.submit(&model, request)
        };
        let mut answers = texts.into_iter().map(submit).collect::<Result<Vec<_>, _>>()?;
        let mut texts = Vec::with_capacity(answers.len());
        for answer in &mut answers {
            let mut output = answer.recv().await;
            if let Some(Output::Reused(_)) = output {
                output = answer.recv().await;
            }
            match output {
                Some(Output::Scores { head, rows }) => texts.push(said(&head, &rows)),
                Some(Output::Failed(error)) => return Err(error.into()),
                _ => return Err(Problem::internal("the engine ended a text without a word")),
            }
        }
        Ok(Classified { model: model.name, texts, prompt_tokens })
    }
}

/// A head's scores in words.
fn said(head: &TaskHead, rows: &[Vec<f32>]) -> Said {
    let ranked = |row: &Vec<f32>| {
        let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f64> = row.iter().map(|score| f64::from(score - highest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let named = head.labels().iter().zip(weights);
        let mut ranked: Vec<LabelProbability> =
            named.map(|(label, weight)| LabelProbability { label: label.clone(), probability: weight / sum }).collect();
        ranked.sort_by(|a, b| b.probability.total_cmp(&a.probability));
        ranked
    };
    match head {
        TaskHead::Score => Said::Score(rows.first().and_then(|row| row.first()).copied().unwrap_or_default()),
        TaskHead::Sequence { .. } => Said::Labels(rows.first().map(ranked).unwrap_or_default()),
        TaskHead::Token { .. } => Said::Tags(rows.iter().filter_map(|row| ranked(row).into_iter().next()).collect()),
    }
}

/// A text's tokens, as a row of a training file has them.
fn reading(model: &Model, index: usize, input: Value) -> Result<Reading, Problem> {
    let param = format!("input.{index}");
    let info = &model.resident.base.info;
    let context =
        data::Context { text: &model.resident.text, base_id: &info.id, max_seq_len: info.context, vocab: info.vocab };
    let text = data::question(input, &context).map_err(|error| match error {
        data::DataError::Line(line) => Problem::invalid(&param, &line.code, line.message),
        error => Problem::invalid(&param, "invalid_input", error.to_string()),
    })?;
    let (length, most) = (text.ids.len() as u64, model.context());
    if length > most {
        let message = format!("{param} has {length} tokens, above the model's context of {most}");
        return Err(Problem::invalid(&param, "context_length_exceeded", message));
    }
    Ok(text)
}
