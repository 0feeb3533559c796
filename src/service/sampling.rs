//! What chat and completions take alike: how tokens are chosen, how many answers there are, where they stop and how
//! they come.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{Problem, fields::in_range};
use crate::{domain::id, inference::Sampling};

/// Completions of one prompt.
const MAX_N: u64 = 16;
/// Seconds.
const MAX_TIMEOUT: f64 = 86_400.0;

/// `"stop": "x"` or a list of up to four.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: Option<bool>,
}

/// The fields as they come; what is left out has its default.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SamplingFields {
    /// 0 (greedy) to 2. Default 1.
    pub temperature: Option<f32>,
    /// Above 0 to 1. Default 1.
    pub top_p: Option<f32>,
    /// −1 and 0 keep all tokens.
    pub top_k: Option<i64>,
    /// 0 to 1, relative to the likeliest token.
    pub min_p: Option<f32>,
    /// 0.01 to 10. Default 1.
    pub repetition_penalty: Option<f32>,
    /// −2 to 2.
    pub presence_penalty: Option<f32>,
    /// −2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Token id to −100 … 100.
    #[schema(value_type = Option<std::collections::HashMap<String, f32>>)]
    pub logit_bias: Option<Map<String, Value>>,
    /// The same seed and request give the same answer.
    pub seed: Option<i64>,
    /// Do not end at the model's end-of-turn token.
    pub ignore_eos: Option<bool>,
    /// A string, or up to four.
    #[schema(value_type = Option<Value>)]
    pub stop: Option<Stop>,
    /// Answers to each prompt, 1 to 16. Default 1.
    pub n: Option<u64>,
    /// Seconds, 0.001 to 86,400: an answer that has not begun by then is an error, and one that has ends there, for
    /// the reason `length`.
    pub timeout: Option<f64>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
}

impl SamplingFields {
    /// All of its fields: which part of a request it is.
    pub const NAMES: [&str; 15] = [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "ignore_eos",
        "stop",
        "n",
        "timeout",
        "stream",
        "stream_options",
    ];

    /// How many answers each prompt gets.
    pub fn answers(&self) -> Result<u64, Problem> {
        in_range("n", self.n.unwrap_or(1), 1, MAX_N)
    }

    /// How long an answer may take.
    pub(super) fn timeout(&self) -> Result<Option<Duration>, Problem> {
        let seconds = self.timeout.map(|timeout| in_range("timeout", timeout, 1e-3, MAX_TIMEOUT)).transpose()?;
        Ok(seconds.map(Duration::from_secs_f64))
    }

    /// None for an answer in one piece; else whether the usage comes at the end.
    pub fn streamed(&self) -> Result<Option<bool>, Problem> {
        match (self.stream.unwrap_or(false), &self.stream_options) {
            (false, Some(_)) => {
                Err(Problem::invalid("stream_options", "invalid_combination", "stream_options needs stream"))
            }
            (false, None) => Ok(None),
            (true, options) => Ok(Some(options.as_ref().is_some_and(|o| o.include_usage.unwrap_or(false)))),
        }
    }

    pub(super) fn sampling(&self, vocab: usize) -> Result<Sampling, Problem> {
        let top_k = in_range("top_k", self.top_k.unwrap_or(-1), -1, i64::from(u32::MAX))?;
        let mut bias = Vec::new();
        for (token, value) in self.logit_bias.iter().flatten() {
            let param = format!("logit_bias.{token}");
            let id: Option<u32> = token.parse().ok().filter(|id| (*id as usize) < vocab);
            let wrong = |why: &str| Problem::invalid(&param, "out_of_range", format!("{param}: {why}"));
            let id = id.ok_or_else(|| wrong(&format!("not a token id below {vocab}")))?;
            let value = value.as_f64().ok_or_else(|| wrong("not a number"))?;
            bias.push((id, in_range(&param, value, -100.0, 100.0)? as f32));
        }
        let number = |param: &str, value: Option<f32>, default: f32, least: f32, most: f32| {
            in_range(param, value.unwrap_or(default), least, most)
        };
        Ok(Sampling {
            temperature: number("temperature", self.temperature, 1.0, 0.0, 2.0)?,
            top_p: number("top_p", self.top_p, 1.0, f32::MIN_POSITIVE, 1.0)?,
            top_k: usize::try_from(top_k).unwrap_or(0),
            min_p: number("min_p", self.min_p, 0.0, 0.0, 1.0)?,
            repetition_penalty: number("repetition_penalty", self.repetition_penalty, 1.0, 0.01, 10.0)?,
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            logit_bias: bias,
            seed: self.seed.map_or_else(random_seed, |seed| seed as u64),
            ignore_eos: self.ignore_eos.unwrap_or(false),
        })
    }

    pub(super) fn stops(&self) -> Result<Vec<String>, Problem> {
        let stops = match self.stop.clone() {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Many(stops)) => stops,
        };
        if stops.len() > 4 || stops.iter().any(|stop| stop.is_empty() || stop.len() > 256) {
            let message = "stop takes at most 4 strings of 1 to 256 bytes";
            return Err(Problem::invalid("stop", "out_of_range", message));
        }
        Ok(stops)
    }
}

fn random_seed() -> u64 {
    id::random(8).bytes().fold(0, |seed, byte| seed << 8 | u64::from(byte))
}
