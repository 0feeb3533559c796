//! Every parameter that OpenAI documents for chat, completions and embeddings changes the answer, or is refused by its
//! name. The lists are OpenAI's, as published in 2026.

use serde_json::{Value, json};

use super::tools::with_template;
use crate::support::server::{BASE, Client};

/// What a parameter does.
enum Does {
    /// The answer to the second request is another than to the first.
    Change(Value, Value),
    /// 400 with its name.
    Refuse(Value),
}
use Does::{Change, Refuse};

/// Against a request that says nothing of it.
fn change(with: Value) -> Does {
    Change(json!({}), with)
}

fn tool(name: &str) -> Value {
    let parameters = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]});
    json!({"type": "function", "function": {"name": name, "parameters": parameters}})
}

fn chat() -> Vec<(&'static str, Does)> {
    let tools = json!([tool("first"), tool("second")]);
    vec![
        ("audio", Refuse(json!({"voice": "a", "format": "wav"}))),
        ("frequency_penalty", change(json!({"frequency_penalty": 2, "max_tokens": 60}))),
        ("function_call", Refuse(json!("auto"))),
        ("functions", Refuse(json!([{"name": "f"}]))),
        ("logit_bias", change(json!({"logit_bias": {"65": 100}}))),
        ("logprobs", change(json!({"logprobs": true}))),
        ("max_completion_tokens", change(json!({"max_completion_tokens": 3, "max_tokens": null}))),
        ("max_tokens", change(json!({"max_tokens": 3}))),
        ("messages", change(json!({"messages": [{"role": "user", "content": "Ho"}]}))),
        ("metadata", Refuse(json!({"a": "b"}))),
        ("modalities", Refuse(json!(["text", "audio"]))),
        ("model", change(json!({"model": "none"}))),
        ("moderation", Refuse(json!({}))),
        ("n", change(json!({"n": 2}))),
        (
            "parallel_tool_calls",
            Change(
                json!({"tools": tools, "parallel_tool_calls": true}),
                json!({"tools": [], "parallel_tool_calls": false}),
            ),
        ),
        ("prediction", Refuse(json!({"type": "content", "content": "a"}))),
        ("presence_penalty", change(json!({"presence_penalty": 2, "max_tokens": 60}))),
        ("prompt_cache_key", Refuse(json!("k"))),
        ("prompt_cache_options", Refuse(json!({}))),
        ("prompt_cache_retention", Refuse(json!("24h"))),
        ("reasoning_effort", Refuse(json!("low"))),
        ("response_format", change(json!({"response_format": {"type": "json_object"}}))),
        ("safety_identifier", Refuse(json!("s"))),
        ("seed", change(json!({"seed": 12}))),
        ("service_tier", Refuse(json!("flex"))),
        ("stop", change(json!({"logit_bias": {"65": 100}, "stop": "AAA"}))),
        ("store", Change(json!({"tools": tools}), json!({"tools": tools, "store": true}))),
        ("stream", change(json!({"stream": true}))),
        (
            "stream_options",
            Change(json!({"stream": true}), json!({"stream": true, "stream_options": {"include_usage": true}})),
        ),
        ("temperature", change(json!({"temperature": 0}))),
        ("tool_choice", Change(json!({"tools": tools}), json!({"tools": tools, "tool_choice": "none"}))),
        ("tools", change(json!({"tools": tools}))),
        ("top_logprobs", Change(json!({"logprobs": true}), json!({"logprobs": true, "top_logprobs": 2}))),
        ("top_p", change(json!({"top_p": 0.05}))),
        ("user", Refuse(json!("u"))),
        ("verbosity", Refuse(json!("low"))),
        ("web_search_options", Refuse(json!({}))),
    ]
}

fn completions() -> Vec<(&'static str, Does)> {
    vec![
        ("best_of", Refuse(json!(3))),
        ("echo", change(json!({"echo": true}))),
        ("frequency_penalty", change(json!({"frequency_penalty": 2, "max_tokens": 60}))),
        ("logit_bias", change(json!({"logit_bias": {"65": 100}}))),
        ("logprobs", change(json!({"logprobs": 1}))),
        ("max_tokens", change(json!({"max_tokens": 3}))),
        ("model", change(json!({"model": "none"}))),
        ("n", change(json!({"n": 2}))),
        ("presence_penalty", change(json!({"presence_penalty": 2, "max_tokens": 60}))),
        ("prompt", change(json!({"prompt": "Ho"}))),
        ("seed", change(json!({"seed": 12}))),
        ("stop", change(json!({"logit_bias": {"65": 100}, "stop": "AAA"}))),
        ("stream", change(json!({"stream": true}))),
        (
            "stream_options",
            Change(json!({"stream": true}), json!({"stream": true, "stream_options": {"include_usage": true}})),
        ),
        ("suffix", Refuse(json!("s"))),
        ("temperature", change(json!({"temperature": 0}))),
        ("top_p", change(json!({"top_p": 0.05}))),
        ("user", Refuse(json!("u"))),
    ]
}

fn embeddings() -> Vec<(&'static str, Does)> {
    vec![
        ("dimensions", change(json!({"dimensions": 3}))),
        ("encoding_format", change(json!({"encoding_format": "base64"}))),
        ("input", change(json!({"input": "b"}))),
        ("model", change(json!({"model": "none"}))),
        ("user", Refuse(json!("u"))),
    ]
}

/// The answer without what is new each time: times and ids.
async fn said(client: &Client, path: &str, base: &Value, extra: &Value) -> String {
    let mut body = base.clone();
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let response = client.request(reqwest::Method::POST, path).json(&body).send().await.unwrap();
    let text = response.text().await.unwrap();
    let json = |text: &str| serde_json::from_str::<Value>(text).ok();
    let mut parts: Vec<Value> = match json(&text) {
        Some(whole) => vec![whole],
        None => text.lines().filter_map(|line| json(line.strip_prefix("data: ")?)).collect(),
    };
    for part in &mut parts {
        for field in ["id", "created"] {
            part.as_object_mut().unwrap().shift_remove(field);
        }
    }
    format!("{parts:?}")
}

#[tokio::test]
async fn each_does_something_or_is_refused_by_name() {
    let server = with_template();
    let client = server.client();
    let shared = json!({"model": BASE, "max_tokens": 24, "seed": 11, "ignore_eos": true});
    let with = |extra: Value| {
        let mut body = shared.clone();
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    for (path, base, table, count) in [
        ("/v1/chat/completions", with(json!({"messages": [{"role": "user", "content": "Hi"}]})), chat(), 37),
        ("/v1/completions", with(json!({"prompt": "Hi"})), completions(), 18),
        ("/v1/embeddings", json!({"model": BASE, "input": "a"}), embeddings(), 5),
    ] {
        assert_eq!(table.len(), count, "{path}");
        assert_eq!(said(&client, path, &base, &json!({})).await, said(&client, path, &base, &json!({})).await);
        for (name, does) in table {
            match does {
                Change(without, with) => {
                    let (before, after) =
                        (said(&client, path, &base, &without).await, said(&client, path, &base, &with).await);
                    assert_ne!(before, after, "{path}: {name} changed nothing");
                    let fails = after.contains("\"error\"") && !after.contains(name);
                    assert!(!fails, "{path}: {name}: {after}");
                }
                Refuse(value) => {
                    let mut body = base.clone();
                    body[name] = value;
                    client.post(path, &body).await.error(400, "unsupported_parameter", Some(name));
                }
            }
        }
        let mut unknown = base;
        unknown["no_such_field"] = json!(1);
        client.post(path, &unknown).await.error(400, "unknown_parameter", Some("no_such_field"));
    }
}
