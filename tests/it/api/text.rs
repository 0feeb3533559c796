//! Chat and completions: counts, streams, prompts as ids, echo.

use serde_json::{Value, json};

use crate::support::server::{BASE, Server};

const CHAT: &str = "/v1/chat/completions";
const COMPLETE: &str = "/v1/completions";

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0,
                          "max_tokens": 12, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// The concatenated text and the last reason of one choice.
fn joined(chunks: &[Value], index: u64) -> (String, Value) {
    let (mut text, mut reason) = (String::new(), Value::Null);
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    for choice in choices.filter(|choice| choice["index"] == index) {
        let piece = choice["delta"]["content"].as_str().or(choice["text"].as_str());
        text.push_str(piece.unwrap_or_default());
        if !choice["finish_reason"].is_null() {
            assert!(reason.is_null(), "two ends");
            reason = choice["finish_reason"].clone();
        }
    }
    (text, reason)
}

#[tokio::test]
async fn a_streamed_chat_says_what_a_whole_one_says() {
    let server = Server::start();
    let client = server.client();
    for n in [1, 3] {
        let sampled = json!({"n": n, "temperature": 1.0, "seed": 5});
        let whole = client.post(CHAT, &chat(sampled.clone())).await.ok();
        let mut body = chat(sampled);
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let mut chunks = client.stream(CHAT, &body).await;
        let last = chunks.pop().unwrap();
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
        for index in 0..n {
            let choice = &whole["choices"][index as usize];
            let (text, reason) = joined(&chunks, index);
            assert_eq!((json!(text), reason), (choice["message"]["content"].clone(), json!("length")), "{whole}");
        }
        assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk" && c["id"] == chunks[0]["id"]));
        // `<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n`, a token a byte but for the special ones.
        assert_eq!(
            whole["usage"],
            json!({"prompt_tokens": 24, "completion_tokens": 12 * n, "total_tokens": 24 + 12 * n,
                   "prompt_tokens_details": {"cached_tokens": 0}})
        );
    }
}

#[tokio::test]
async fn prompts_are_texts_or_ids_one_or_many() {
    let server = Server::start();
    let client = server.client();
    let ask = |prompt: Value| {
        let body = json!({"model": BASE, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": true});
        let client = client.clone();
        async move { client.post(COMPLETE, &body).await.ok() }
    };
    // The tiny tokenizer's ids are bytes.
    let ids = |text: &str| text.bytes().map(|byte| json!(byte)).collect::<Vec<_>>();
    let (one, other) = (ask(json!("one")).await, ask(json!("another")).await);
    assert_ne!(one["choices"][0]["text"], other["choices"][0]["text"]);
    assert_eq!(ask(json!(ids("one"))).await["choices"], one["choices"]);
    for both in [ask(json!(["one", "another"])).await, ask(json!([ids("one"), ids("another")])).await] {
        assert_eq!(both["choices"][0]["text"], one["choices"][0]["text"]);
        assert_eq!(both["choices"][1]["text"], other["choices"][0]["text"]);
        assert_eq!(both["usage"]["prompt_tokens"], 10);
        assert_eq!(both["usage"]["completion_tokens"], 12);
    }
}

#[tokio::test]
async fn echo_scores_the_prompt() {
    let server = Server::start();
    let client = server.client();
    let prompt = "hé!";
    let body = json!({"model": BASE, "prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 2});
    let scored = client.post(COMPLETE, &body).await.ok();
    let (choice, n) = (&scored["choices"][0], prompt.len());
    assert_eq!(choice["text"], prompt);
    assert_eq!(scored["usage"]["total_tokens"], n);
    let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), n);
    // The two bytes of the second character.
    assert_eq!(choice["logprobs"]["tokens"], json!(["h", "bytes:\\xc3", "bytes:\\xa9", "!"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 1, 2]));
    assert!(logprobs[0].is_null() && logprobs[1..].iter().all(|l| l.as_f64().unwrap() < 0.0), "{logprobs:?}");
    // Scores do not depend on what follows.
    let body = json!({"model": BASE, "prompt": prompt, "max_tokens": 3, "echo": true, "logprobs": 2, "temperature": 0,
                      "ignore_eos": true});
    let longer = client.post(COMPLETE, &body).await.ok();
    let all = longer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!((all.len(), &all[..n]), (n + 3, &logprobs[..]));
    assert!(longer["choices"][0]["text"].as_str().unwrap().starts_with(prompt));
    // The greedy choice is the best of its alternatives.
    for (logprob, top) in
        all[n..].iter().zip(&longer["choices"][0]["logprobs"]["top_logprobs"].as_array().unwrap()[n..])
    {
        let best = top.as_object().unwrap().values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert_eq!(logprob.as_f64().unwrap(), best);
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it() {
    let server = Server::start();
    let client = server.client();
    let plain = json!({"model": BASE, "prompt": "stop here", "max_tokens": 40, "seed": 3, "ignore_eos": true,
                       "logit_bias": {}, "temperature": 1.0});
    let whole = client.post(COMPLETE, &plain).await.ok();
    let text = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    // Two characters from the middle: more than one token.
    let letters: Vec<char> = text.chars().collect();
    let stop: String = letters[letters.len() / 2..letters.len() / 2 + 2].iter().collect();
    let expected = text.split(&stop).next().unwrap();
    for given in [json!(stop), json!(["never there", stop])] {
        let mut body = plain.clone();
        body["stop"] = given;
        let stopped = client.post(COMPLETE, &body).await.ok();
        assert_eq!(stopped["choices"][0]["text"], expected);
        assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
        assert!(stopped["usage"]["completion_tokens"].as_i64() < Some(40), "{stopped}");
        body["stream"] = json!(true);
        let (streamed, reason) = joined(&client.stream(COMPLETE, &body).await, 0);
        assert_eq!((streamed.as_str(), reason), (expected, json!("stop")));
    }
}

#[tokio::test]
async fn a_tuned_model_answers_differently_and_its_base_as_before() {
    let server = Server::start();
    let client = server.client();
    let before = client.post(CHAT, &chat(json!({"logprobs": true}))).await.ok();
    let job = client.trained(&client.file(8).await).await;
    let model = job["fine_tuned_model"].as_str().unwrap_or_else(|| panic!("{job}"));
    let tuned = client.post(CHAT, &chat(json!({"model": model, "logprobs": true}))).await.ok();
    let after = client.post(CHAT, &chat(json!({"logprobs": true}))).await.ok();
    assert_eq!(before["choices"], after["choices"]);
    assert_ne!(before["choices"][0]["logprobs"], tuned["choices"][0]["logprobs"]);
    let object = client.get(&format!("/v1/models/{model}")).await.ok();
    assert_eq!((&object["parent"], &object["id"]), (&json!(BASE), &json!(model)));
    assert_eq!(tuned["system_fingerprint"], object["adapter_generation"]);
    // The last checkpoint is the result.
    let checkpoints =
        client.get(&format!("/v1/fine_tuning/jobs/{}/checkpoints", job["id"].as_str().unwrap())).await.ok();
    let last = checkpoints["data"][0]["fine_tuned_model_checkpoint"].as_str().unwrap();
    assert_eq!(last, format!("{model}:ckpt-step-2"));
    let same = client.post(CHAT, &chat(json!({"model": last, "logprobs": true}))).await.ok();
    assert_eq!(same["choices"], tuned["choices"]);
    // Out and in again: the same bytes are the same generation.
    let adapter = client.get(&format!("/v1/adapters/{model}")).await.ok();
    for format in ["zip", "tar"] {
        let path = format!("/v1/adapters/{}/download?format={format}", adapter["id"].as_str().unwrap());
        let packed = client.request(reqwest::Method::GET, &path).send().await.unwrap().bytes().await.unwrap();
        let part = reqwest::multipart::Part::bytes(packed.to_vec()).file_name("adapter");
        let form = reqwest::multipart::Form::new().text("model", BASE).text("suffix", "again").part("file", part);
        let sent = client.request(reqwest::Method::POST, "/v1/adapters").multipart(form);
        let imported = crate::support::server::answer(sent).await.ok();
        assert_eq!(imported["generation"], adapter["generation"]);
        let same = client.post(CHAT, &chat(json!({"model": imported["model"], "logprobs": true}))).await.ok();
        assert_eq!(same["choices"], tuned["choices"]);
    }
    // Merged, it is a model of its own.
    let merge = client.request(reqwest::Method::POST, &format!("/v1/adapters/{model}/merge")).send().await.unwrap();
    assert_eq!(
        (merge.status().as_u16(), merge.headers()["content-type"].as_bytes()),
        (200, &b"application/octet-stream"[..])
    );
    let dir = tempfile::tempdir().unwrap();
    let packed = std::io::Cursor::new(merge.bytes().await.unwrap());
    zip::ZipArchive::new(packed).unwrap().extract(dir.path()).unwrap();
    let merged = attune::model::Base::open("merged", dir.path()).unwrap();
    assert_eq!((merged.info.storage.as_str(), merged.info.tied), ("F32", true));
    client.post("/v1/adapters/adapter-none/merge", &json!({})).await.error(404, "not_found", Some("id"));
    assert_eq!(client.delete(&format!("/v1/models/{model}")).await.ok()["deleted"], true);
    client.post(CHAT, &chat(json!({"model": model}))).await.error(404, "model_not_found", Some("model"));
    client.get(&format!("/v1/models/{model}")).await.error(404, "model_not_found", Some("model"));
    // Its checkpoint has the same generation and still answers.
    let same = client.post(CHAT, &chat(json!({"model": last, "logprobs": true}))).await.ok();
    assert_eq!(same["choices"], tuned["choices"]);
}

#[tokio::test]
async fn usage_says_what_was_not_read_again() {
    let server = Server::start();
    let client = server.client();
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let prompt = "a system prompt that many requests share, word for word, and then some".repeat(2);
    let body = json!({"model": BASE, "prompt": prompt, "max_tokens": 3, "temperature": 0});
    let first = client.post(COMPLETE, &body).await.ok();
    let again = client.post(COMPLETE, &body).await.ok();
    assert_eq!((cached(&first), cached(&again)), (0, (prompt.len() as u64 - 1) / 32 * 32));
    assert_eq!(first["choices"], again["choices"]);
    // Two completions of a prompt: it counts once.
    let mut two = body.clone();
    (two["n"], two["stream"], two["stream_options"]) = (json!(2), json!(true), json!({"include_usage": true}));
    assert_eq!(cached(client.stream(COMPLETE, &two).await.last().unwrap()), cached(&again));
    let mut chat = json!({"model": BASE, "messages": [{"role": "user", "content": prompt}], "max_tokens": 2});
    assert_eq!(cached(&client.post(CHAT, &chat).await.ok()), 0);
    assert!(cached(&client.post(CHAT, &chat).await.ok()) >= 128);
    // Another project has read nothing yet.
    let other = server.client_with(&server.create_key("other", "all"));
    assert_eq!(cached(&other.post(CHAT, &chat).await.ok()), 0);
    chat["stream"] = json!(true);
    chat["stream_options"] = json!({"include_usage": true});
    assert!(cached(other.stream(CHAT, &chat).await.last().unwrap()) >= 128);
}
