//! Every documented parameter changes the answer, or is refused by name.

use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server};

const CHAT: &str = "/v1/chat/completions";
const COMPLETE: &str = "/v1/completions";

fn with(mut body: Value, extra: &Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// The generated tokens of a completion of "abc abc", by their text.
async fn tokens(client: &Client, extra: Value) -> Value {
    let body =
        json!({"model": BASE, "prompt": "abc abc", "max_tokens": 24, "seed": 11, "logprobs": 0, "ignore_eos": true});
    client.post(COMPLETE, &with(body, &extra)).await.ok()["choices"][0]["logprobs"]["tokens"].clone()
}

#[tokio::test]
async fn sampling_parameters_change_what_is_drawn() {
    let server = Server::start();
    let client = server.client();
    let plain = tokens(&client, json!({})).await;
    assert_eq!(plain.as_array().unwrap().len(), 24);
    assert_eq!(tokens(&client, json!({})).await, plain, "the same seed gives the same answer");
    let greedy = tokens(&client, json!({"temperature": 0})).await;
    for changed in [
        json!({"seed": 12}),
        json!({"seed": -11}),
        json!({"temperature": 0}),
        json!({"temperature": 0.3}),
        json!({"top_p": 0.05}),
        json!({"top_k": 2}),
        json!({"min_p": 0.5}),
        json!({"logit_bias": {"65": 100}}),
        json!({"max_tokens": 3}),
    ] {
        assert_ne!(tokens(&client, changed.clone()).await, plain, "{changed} changed nothing");
    }
    for neutral in [
        json!({"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0}),
        json!({"top_k": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}),
        json!({"best_of": 1, "suffix": null, "user": null, "n": 1, "stop": null, "stream": false}),
    ] {
        assert_eq!(tokens(&client, neutral.clone()).await, plain, "{neutral} changed something");
    }
    for greedy_too in
        [json!({"top_k": 1}), json!({"min_p": 1}), json!({"top_p": 1e-6}), json!({"temperature": 0, "seed": 1})]
    {
        assert_eq!(tokens(&client, greedy_too.clone()).await, greedy, "{greedy_too}");
    }
    let only_a = tokens(&client, json!({"logit_bias": {"65": 100}})).await;
    assert!(only_a.as_array().unwrap().iter().all(|token| token == "A"), "{only_a}");
}

#[tokio::test]
async fn penalties_make_repetition_rarer() {
    let server = Server::start();
    let client = server.client();
    // A bias that all but forces one letter, so that only a penalty can bring another one.
    let biased = json!({"temperature": 0, "logit_bias": {"65": 30}, "max_tokens": 24});
    let always = tokens(&client, biased.clone()).await;
    assert!(always.as_array().unwrap().iter().all(|token| token == "A"), "{always}");
    let penalised = tokens(&client, with(biased, &json!({"frequency_penalty": 2}))).await;
    assert_ne!(penalised, always, "frequency_penalty changed nothing");
    assert_eq!(penalised[0], "A", "what has not been said is not punished");
    // The bias comes behind this one, so it is tried on what the model likes to say by itself.
    let distinct = |tokens: &Value| {
        let tokens = tokens.as_array().unwrap();
        tokens.iter().filter_map(Value::as_str).collect::<std::collections::BTreeSet<_>>().len()
    };
    let greedy = tokens(&client, json!({"temperature": 0})).await;
    let varied = tokens(&client, json!({"temperature": 0, "repetition_penalty": 10})).await;
    assert!(distinct(&varied) > distinct(&greedy), "{varied} {greedy}");
    // Presence counts once, so it needs a close race: greedy text, which repeats itself or not, must change.
    let sampled = json!({"temperature": 1, "seed": 4, "max_tokens": 64});
    let plain = tokens(&client, sampled.clone()).await;
    assert_ne!(tokens(&client, with(sampled, &json!({"presence_penalty": 2}))).await, plain);
}

#[tokio::test]
async fn the_end_of_turn_ends_a_completion_unless_it_is_ignored() {
    let server = Server::start();
    let client = server.client();
    // 258 is `<|im_end|>`.
    let ask = json!({"model": BASE, "prompt": "a", "max_tokens": 5, "temperature": 0, "logit_bias": {"258": 100}});
    let ended = client.post(COMPLETE, &ask).await.ok();
    assert_eq!((&ended["choices"][0]["finish_reason"], &ended["choices"][0]["text"]), (&json!("stop"), &json!("")));
    let ignored = client.post(COMPLETE, &with(ask, &json!({"ignore_eos": true}))).await.ok();
    assert_eq!(ignored["choices"][0]["finish_reason"], "length");
    assert_eq!(ignored["usage"]["completion_tokens"], 5);
}

#[tokio::test]
async fn n_answers_differ_and_logprobs_have_as_many_alternatives_as_asked() {
    let server = Server::start();
    let client = server.client();
    let ask = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 1, "n": 3,
                     "ignore_eos": true, "logprobs": true, "top_logprobs": 4});
    let answer = client.post(CHAT, &ask).await.ok();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    assert!(choices[0]["message"] != choices[1]["message"] && choices[1]["message"] != choices[2]["message"]);
    for choice in choices {
        let content = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(content.len(), 8);
        for token in content {
            let top: Vec<f64> =
                token["top_logprobs"].as_array().unwrap().iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
            assert_eq!(top.len(), 4);
            assert!(top.is_sorted_by(|a, b| a >= b), "{top:?}");
            assert!(token["logprob"].as_f64().unwrap() <= top[0]);
        }
    }
    let none = client.post(CHAT, &with(ask, &json!({"logprobs": false, "top_logprobs": null}))).await.ok();
    assert!(none["choices"][0]["logprobs"].is_null());
}

#[tokio::test]
async fn what_openai_documents_and_we_do_not_serve_is_refused_by_name() {
    let server = Server::start();
    let client = server.client();
    let chat = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
    let refused = [
        ("audio", json!({"voice": "a", "format": "wav"})),
        ("function_call", json!("auto")),
        ("functions", json!([{"name": "f"}])),
        ("metadata", json!({"a": "b"})),
        ("modalities", json!(["text", "audio"])),
        ("moderation", json!({})),
        ("prediction", json!({"type": "content", "content": "a"})),
        ("reasoning_effort", json!("low")),
        ("service_tier", json!("flex")),
        ("user", json!("u")),
        ("verbosity", json!("low")),
        ("web_search_options", json!({})),
    ];
    for (name, value) in refused {
        let message = client.post(CHAT, &with(chat.clone(), &json!({name: value}))).await;
        let message = message.error(400, "unsupported_parameter", Some(name));
        assert!(message.contains(name), "{message}");
    }
    let neutral = json!({
        "modalities": ["text"], "response_format": {"type": "text"}, "service_tier": "auto", "store": false,
        "tool_choice": "none", "tools": [], "parallel_tool_calls": true, "audio": null,
    });
    client.post(CHAT, &with(chat.clone(), &neutral)).await.ok();
    for (name, value) in [("suffix", json!("s")), ("best_of", json!(3)), ("user", json!("u"))] {
        let body = json!({"model": BASE, "prompt": "a", "max_tokens": 1, name: value});
        client.post(COMPLETE, &body).await.error(400, "unsupported_parameter", Some(name));
    }
    for (part, param) in [
        (json!({"role": "user", "content": "a", "name": "n"}), "messages.0.name"),
        (
            json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
            "messages.0.content.0",
        ),
    ] {
        let body = with(chat.clone(), &json!({"messages": [part]}));
        client.post(CHAT, &body).await.error(400, "unsupported_parameter", Some(param));
    }
}
