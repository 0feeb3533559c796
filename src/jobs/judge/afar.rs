//! A model on an OpenAI-compatible server elsewhere.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use super::Spent;
use crate::{domain::spec::SamplingParams, outbound::Web};

/// Alternatives of a token: the most that OpenAI gives.
const ALTERNATIVES: u64 = 20;

/// A model and where it is.
pub struct Afar<'a> {
    pub web: &'a Web,
    /// Up to `/v1`.
    pub address: &'a str,
    pub model: &'a str,
}

impl Afar<'_> {
    /// An answer that `read` has a use for.
    pub async fn write<T>(
        &self,
        messages: &[Value],
        params: &SamplingParams,
        spent: &mut Spent,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, String> {
        let mut body = json!({"model": self.model, "messages": messages, "temperature": params.temperature(),
                              "max_tokens": params.max_tokens()});
        if let Some(top_p) = params.top_p {
            body["top_p"] = json!(top_p);
        }
        if let Some(seed) = params.seed {
            body["seed"] = json!(seed);
        }
        self.ask(body, spent, |choice| {
            let text = choice["message"]["content"].as_str().ok_or("its answer has no text")?;
            read(text)
        })
        .await
    }

    /// How likely the answer's first token is each of `labels`, as far as the server tells: those that are not among
    /// the likeliest tokens are 0.
    pub async fn likelihoods(
        &self,
        messages: &[Value],
        labels: &[String],
        spent: &mut Spent,
    ) -> Result<Vec<f64>, String> {
        let body = json!({"model": self.model, "messages": messages, "max_tokens": 1, "logprobs": true,
                          "top_logprobs": ALTERNATIVES});
        self.ask(body, spent, |choice| {
            let top = choice["logprobs"]["content"][0]["top_logprobs"].as_array();
            let top = top.ok_or("its answer has no log-probabilities")?;
            let is = |token: &Value, label: &str| token["token"].as_str().map(str::trim) == Some(label);
            let share = |label: &String| {
                let found = top.iter().filter(|token| is(token, label)).filter_map(|token| token["logprob"].as_f64());
                found.map(f64::exp).sum()
            };
            Ok(labels.iter().map(share).collect())
        })
        .await
    }

    async fn ask<T>(
        &self,
        body: Value,
        spent: &mut Spent,
        read: impl Fn(&Value) -> Result<T, String>,
    ) -> Result<T, String> {
        let address = format!("{}/chat/completions", self.address.trim_end_matches('/'));
        let used = (AtomicU64::new(0), AtomicU64::new(0));
        let found = self.web.ask(&address, &body, |answer| {
            let count = |field: &str| answer["usage"][field].as_u64().unwrap_or(0);
            used.0.fetch_add(count("prompt_tokens"), Ordering::Relaxed);
            used.1.fetch_add(count("completion_tokens"), Ordering::Relaxed);
            read(&answer["choices"][0])
        });
        let found = found.await.map_err(|error| error.to_string());
        spent.add(self.model, used.0.into_inner(), used.1.into_inner());
        found
    }
}
