//! Graders that ask somebody: a model here, a model elsewhere, a service.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// Messages of one question.
const MAX_MESSAGES: usize = 64;
/// Tokens of an answer.
const MAX_TOKENS: u64 = 32_768;

/// A model that reads the answer and says a number: OpenAI's shape, with `scoring` and `endpoint` of our own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreModel {
    pub name: String,
    /// A base or a tuned model of this server; with `endpoint`, a model there.
    pub model: String,
    /// What the model is asked.
    pub input: Vec<GraderMessage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_params: Option<SamplingParams>,
    /// The least and the greatest score. Default: 0 and 1; with `scoring` expected, −1 and 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 2, max_items = 2)]
    pub range: Option<[f64; 2]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scoring: Option<Scoring>,
    /// The address of an OpenAI-compatible server, up to `/v1`. Its key is a setting of this server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

/// How a model's answer becomes a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// The answer is a number, a JSON object with `result` or `score`, or has one of them in its last line.
    #[default]
    Answer,
    /// The model is asked for a whole number from 1 to 10; the score is what can be expected by the probabilities of
    /// its first tokens, `Σ i·P(i) / Σ P(i)`, brought from 1…10 to `range`. Nothing is drawn.
    Expected,
}

/// A message of a question. Texts may hold places, as those of other graders.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GraderMessage {
    pub role: GraderRole,
    /// A text, or one or more parts `{"type": "input_text" or "output_text", "text"}`.
    #[schema(value_type = Value)]
    pub content: Value,
    /// Always `message`.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<GraderMessageType>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GraderMessageType {
    Message,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GraderRole {
    System,
    Developer,
    User,
    Assistant,
}

/// How a judge's answer is drawn.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SamplingParams {
    /// Default 0; an answer that cannot be used is asked for again with the next seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Above 0, to 1. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// 0 to 2. Default 1. At 0 the same model answers the same, so that it is asked once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Default 256. OpenAI's spelling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_completions_tokens: Option<u64>,
}

/// The score of a reward model of this server. It is given the row's `messages` with the answer behind them, as it was
/// given rows in its training; a job's stands on the job's own base.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RewardModel {
    pub name: String,
    /// What a `reward_model` job made.
    pub model: String,
}

/// A service that is sent the row and the answer, `{"item", "sample": {"output_text", "output_json"}}`, and says
/// `{"score": number}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    pub name: String,
    pub url: String,
}

impl GraderRole {
    pub fn name(self) -> &'static str {
        match self {
            GraderRole::System => "system",
            GraderRole::Developer => "developer",
            GraderRole::User => "user",
            GraderRole::Assistant => "assistant",
        }
    }
}

impl GraderMessage {
    /// Its parts' texts, joined; or what is wrong with it.
    pub fn text(&self) -> Result<String, String> {
        let part = |part: &Value| match (part.as_str(), part["type"].as_str(), part["text"].as_str()) {
            (Some(text), ..) | (_, Some("input_text" | "output_text"), Some(text)) => Ok(text.to_owned()),
            _ => Err("only texts, and parts of type input_text or output_text, are supported".to_owned()),
        };
        match &self.content {
            Value::Array(parts) => parts.iter().map(part).collect(),
            one => part(one),
        }
    }
}

impl SamplingParams {
    pub fn temperature(&self) -> f64 {
        self.temperature.unwrap_or(1.0)
    }

    pub fn max_tokens(&self) -> u64 {
        self.max_completions_tokens.unwrap_or(256)
    }

    /// The field that is wrong, and why.
    fn check(&self) -> Result<(), (String, String)> {
        let wrong = |field: &str, why: String| Err((format!("sampling_params.{field}"), why));
        match (self.temperature(), self.top_p.unwrap_or(1.0), self.max_tokens()) {
            (t, ..) if !(0.0..=2.0).contains(&t) => wrong("temperature", format!("{t} is outside 0 to 2")),
            (_, p, _) if !(p > 0.0 && p <= 1.0) => wrong("top_p", format!("{p} is not above 0, to 1")),
            (.., n) if !(1..=MAX_TOKENS).contains(&n) => {
                wrong("max_completions_tokens", format!("{n} is outside 1 to {MAX_TOKENS}"))
            }
            _ => Ok(()),
        }
    }
}

impl ScoreModel {
    pub fn scoring(&self) -> Scoring {
        self.scoring.unwrap_or_default()
    }

    pub fn range(&self) -> [f64; 2] {
        self.range.unwrap_or(match self.scoring() {
            Scoring::Answer => [0.0, 1.0],
            Scoring::Expected => [-1.0, 1.0],
        })
    }

    /// The field that is wrong, and why.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let wrong = |field: &str, why: String| Err((field.to_owned(), why));
        if self.model.is_empty() {
            return wrong("model", "it is empty".to_owned());
        }
        if !(1..=MAX_MESSAGES).contains(&self.input.len()) {
            return wrong("input", format!("it has {} messages; it takes 1 to {MAX_MESSAGES}", self.input.len()));
        }
        for (i, message) in self.input.iter().enumerate() {
            message.text().map_err(|why| (format!("input.{i}.content"), why))?;
        }
        let [least, greatest] = self.range();
        if !(least < greatest && least.is_finite() && greatest.is_finite()) {
            return wrong("range", format!("{least} is not below {greatest}"));
        }
        match (self.scoring(), &self.sampling_params) {
            (Scoring::Expected, Some(_)) => {
                wrong("sampling_params", "scoring expected draws nothing: leave it out".to_owned())
            }
            (_, Some(params)) => params.check(),
            _ => Ok(()),
        }
    }
}
