//! Input that cannot be served gets an error that names the field and the limit.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server, answer, chat_rows};

const CHAT: &str = "/v1/chat/completions";
const COMPLETE: &str = "/v1/completions";
const JOBS: &str = "/v1/fine_tuning/jobs";

fn with(mut body: Value, extra: &Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_job_that_cannot_run_is_refused_at_once() {
    let server = Server::start();
    let client = server.client();
    let good = json!({"model": BASE, "training_file": client.file(4).await});
    // (what is added, status, code, param, a part of the message)
    let cases = [
        (json!({"model": "gpt-none"}), 404, "model_not_found", "model", "gpt-none"),
        (json!({"training_file": "file-none"}), 404, "not_found", "training_file", "file-none"),
        (json!({"validation_file": "file-none"}), 404, "not_found", "validation_file", "file-none"),
        (json!({"status": "succeeded"}), 400, "unknown_parameter", "status", "unknown field status"),
        (json!({"fence": 9}), 400, "unknown_parameter", "fence", "fence"),
        (json!({"project": "p"}), 400, "unknown_parameter", "project", "project"),
        (json!({"adapter": {"type": "lora", "rank": 8}}), 400, "spec_unknown_field", "adapter.rank", "rank"),
        (json!({"adapter": {"type": "lora", "r": 0}}), 400, "spec_out_of_range", "adapter.r", "0"),
        (json!({"adapter": {"type": "lora", "r": 65}}), 400, "spec_out_of_range", "adapter.r", "65"),
        (json!({"adapter": {"type": "lora", "r": -1}}), 400, "spec_invalid_type", "adapter.r", "-1"),
        (json!({"adapter": {"type": "lora", "r": 2.5}}), 400, "spec_invalid_type", "adapter.r", "2.5"),
        (json!({"adapter": {"target_modules": ["nope"]}}), 400, "spec_no_match", "adapter.target_modules", "nope"),
        (json!({"adapter": {"type": "magic"}}), 400, "spec_unknown_type", "adapter.type", "magic"),
        (json!({"adapter": []}), 400, "spec_invalid_type", "adapter", "object"),
        (json!({"training": {"lr": 1}}), 400, "spec_unknown_field", "training.lr", "lr"),
        (json!({"training": {"max_seq_len": 513}}), 400, "spec_out_of_range", "training.max_seq_len", "512"),
        (json!({"training": {"learning_rate": 0}}), 400, "spec_out_of_range", "training.learning_rate", "0"),
        (json!({"training": {"optimizer": "sgd"}}), 400, "spec_invalid_type", "training.optimizer", "adamw_8bit"),
        (
            json!({"training": {"gradient_checkpointing": "auto"}}),
            400,
            "spec_invalid_type",
            "training.gradient_checkpointing",
            "boolean",
        ),
        (json!({"adapter": {"type": "auto", "r": 8}}), 400, "spec_unknown_field", "adapter.r", "auto"),
        (json!({"method": {"type": "ppo"}}), 400, "spec_missing", "method.ppo.grader", "grader"),
        (json!({"method": {"type": "magic"}}), 400, "spec_unknown_type", "method.type", "magic"),
        (json!({"suffix": "a:b"}), 400, "invalid_suffix", "suffix", "64"),
        (json!({"suffix": ""}), 400, "invalid_suffix", "suffix", "64"),
        (json!({"priority": 101}), 400, "out_of_range", "priority", "100"),
        (json!({"seed": -1}), 400, "invalid_type", "seed", "-1"),
        (json!({"metadata": {"a": 1}}), 400, "invalid_metadata", "metadata", "string"),
        (json!({"integrations": [{"type": "wandb"}]}), 400, "unsupported_parameter", "integrations", "integrations"),
    ];
    for (extra, status, code, param, part) in cases {
        let message = client.post(JOBS, &with(good.clone(), &extra)).await.error(status, code, Some(param));
        assert!(message.contains(part), "{extra}: {message}");
    }
    let epochs = json!({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1001}}}});
    let param = "method.supervised.hyperparameters.n_epochs";
    client.post(JOBS, &with(good.clone(), &epochs)).await.error(400, "spec_out_of_range", Some(param));
    for name in ["model", "training_file"] {
        let mut body = good.clone();
        body.as_object_mut().unwrap().remove(name);
        client.post(JOBS, &body).await.error(400, "missing_required_parameter", Some(name));
    }
    assert_eq!(client.get(JOBS).await.ok()["data"], json!([]), "nothing was created");
}

#[tokio::test]
async fn a_dataset_with_a_bad_line_is_named_by_line() {
    let server = Server::start();
    let client = server.client();
    let good = chat_rows(1);
    let with_line = |line: &[u8]| [good.as_bytes(), line, b"\n", good.as_bytes()].concat();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let cases: [(&str, Vec<u8>, &str); 7] = [
        ("not JSON", with_line(b"{not json"), "line 2"),
        ("no assistant", with_line(br#"{"messages":[{"role":"user","content":"a"}]}"#), "line 2"),
        ("bad UTF-8", with_line(b"{\"messages\": \"\xff\xfe\"}"), "line 2"),
        ("an array", with_line(b"[1, 2]"), "line 2"),
        ("deep", with_line(deep.as_bytes()), "line 2"),
        ("an unknown role", with_line(br#"{"messages":[{"role":"king","content":"a"}]}"#), "line 2"),
        ("another format", with_line(br#"{"prompt":"a","completion":"b"}"#), "line 2"),
    ];
    for (name, content, line) in cases {
        let file = client.upload(content).await.ok();
        assert_eq!(file["status"], "error", "{name}: {file}");
        assert!(file["status_details"].as_str().unwrap().contains(line), "{name}: {file}");
        let id = file["id"].as_str().unwrap();
        let report = client.get(&format!("/v1/files/{id}/report")).await.ok();
        assert_eq!((&report["errors"][0]["line"], &report["error_count"]), (&json!(2), &json!(1)), "{name}: {report}");
        let refused = client.post(JOBS, &json!({"model": BASE, "training_file": id})).await;
        assert_eq!((refused.status, &refused.body["error"]["param"]), (400, &json!("training_file")), "{name}");
        let message = refused.body["error"]["message"].as_str().unwrap();
        assert!(message.contains(line), "{name}: {message}");
    }
    client.upload("").await.error(400, "empty_file", Some("file"));
    let blank = client.upload("\n\n").await.ok();
    assert_eq!(blank["status"], "error", "{blank}");
}

#[tokio::test]
async fn rows_above_the_context_are_counted_and_never_cut() {
    let server = Server::start();
    let client = server.client();
    let long =
        json!({"messages": [{"role": "user", "content": "a".repeat(600)}, {"role": "assistant", "content": "b"}]});
    let all_long = client.upload(format!("{long}\n{long}\n")).await.ok();
    let body = json!({"model": BASE, "training_file": all_long["id"]});
    let message = client.post(JOBS, &body).await.error(400, "dataset_empty", Some("training_file"));
    assert!(message.contains("512"), "{message}");
    // Beside rows that fit, they are left out and the job's events say how many.
    let mixed = client.upload(format!("{}{long}\n{long}\n", chat_rows(3))).await.ok();
    let job = client.trained(mixed["id"].as_str().unwrap()).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    let events = client.events(job["id"].as_str().unwrap(), None).await;
    let warnings: Vec<&Value> =
        events.iter().filter(|(_, e)| e["level"] == "warn").map(|(_, e)| &e["message"]).collect();
    assert!(warnings.iter().any(|w| w.as_str().unwrap().contains('2')), "{warnings:?}");
}

#[tokio::test]
async fn numbers_beyond_the_limits_are_refused() {
    let server = Server::start();
    let client = server.client();
    let chat = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}]});
    let complete = json!({"model": BASE, "prompt": "Hi"});
    let shared = [
        (json!({"n": 1_000_000_000}), "out_of_range", "n"),
        (json!({"n": 0}), "out_of_range", "n"),
        (json!({"n": -1}), "invalid_type", "n"),
        (json!({"n": 1.5}), "invalid_type", "n"),
        (json!({"max_tokens": -1}), "invalid_type", "max_tokens"),
        (json!({"max_tokens": 513}), "context_length_exceeded", "max_tokens"),
        (json!({"max_tokens": u64::MAX}), "context_length_exceeded", "max_tokens"),
        (json!({"temperature": 2.1}), "out_of_range", "temperature"),
        (json!({"temperature": "hot"}), "invalid_type", "temperature"),
        (json!({"top_p": 0}), "out_of_range", "top_p"),
        (json!({"top_p": 1.1}), "out_of_range", "top_p"),
        (json!({"top_k": -2}), "out_of_range", "top_k"),
        (json!({"min_p": 2}), "out_of_range", "min_p"),
        (json!({"timeout": 0}), "out_of_range", "timeout"),
        (json!({"timeout": 86_401}), "out_of_range", "timeout"),
        (json!({"presence_penalty": 2.5}), "out_of_range", "presence_penalty"),
        (json!({"frequency_penalty": -2.5}), "out_of_range", "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "out_of_range", "repetition_penalty"),
        (json!({"logit_bias": {"260": 1}}), "out_of_range", "logit_bias.260"),
        (json!({"logit_bias": {"a": 1}}), "out_of_range", "logit_bias.a"),
        (json!({"logit_bias": {"1": 101}}), "out_of_range", "logit_bias.1"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "out_of_range", "stop"),
        (json!({"stop": ""}), "out_of_range", "stop"),
        (json!({"stream_options": {"include_usage": true}}), "invalid_combination", "stream_options"),
        (json!({"temprature": 1}), "unknown_parameter", "temprature"),
        (json!({"model": 5}), "invalid_type", "model"),
    ];
    for (path, good) in [(CHAT, &chat), (COMPLETE, &complete)] {
        for (extra, code, param) in &shared {
            client.post(path, &with(good.clone(), extra)).await.error(400, code, Some(param));
        }
        let unknown = with(good.clone(), &json!({"model": "none"}));
        client.post(path, &unknown).await.error(404, "model_not_found", Some("model"));
    }
    let chats = [
        (json!({"messages": []}), "empty_messages", "messages"),
        (json!({"messages": [{"role": "king", "content": "a"}]}), "invalid_message", "messages.0.role"),
        (json!({"messages": [{"role": "user"}]}), "invalid_message", "messages.0.content"),
        (json!({"messages": [5]}), "invalid_message", "messages.0"),
        (json!({"top_logprobs": 2}), "invalid_combination", "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "out_of_range", "top_logprobs"),
        (json!({"max_tokens": 0}), "out_of_range", "max_tokens"),
        (json!({"max_tokens": 1, "max_completion_tokens": 1}), "given_twice", "max_tokens"),
        (json!({"messages": [{"role": "user", "content": "a".repeat(600)}]}), "context_length_exceeded", "messages"),
    ];
    for (extra, code, param) in chats {
        client.post(CHAT, &with(chat.clone(), &extra)).await.error(400, code, Some(param));
    }
    let completions = [
        (json!({"prompt": "a".repeat(600)}), "context_length_exceeded", "prompt"),
        (json!({"prompt": [260]}), "out_of_range", "prompt"),
        (json!({"prompt": ""}), "empty_prompt", "prompt"),
        (json!({"prompt": vec!["a"; 65]}), "out_of_range", "prompt"),
        (json!({"prompt": {"a": 1}}), "invalid_type", "prompt"),
        (json!({"logprobs": 21}), "out_of_range", "logprobs"),
        (json!({"max_tokens": 0}), "out_of_range", "max_tokens"),
    ];
    for (extra, code, param) in completions {
        client.post(COMPLETE, &with(complete.clone(), &extra)).await.error(400, code, Some(param));
    }
    let limits = client.post(COMPLETE, &with(complete.clone(), &json!({"max_tokens": 511}))).await;
    let message = limits.error(400, "context_length_exceeded", Some("max_tokens"));
    assert!(message.contains("511") && message.contains("2 tokens") && message.contains("512"), "{message}");
    // The limit itself is fine.
    let most = with(complete, &json!({"max_tokens": 510, "ignore_eos": true, "temperature": 0}));
    assert_eq!(client.post(COMPLETE, &most).await.ok()["usage"]["total_tokens"], 512);
}

#[tokio::test]
async fn requests_that_are_no_requests_get_the_envelope_too() {
    let server = Server::start();
    let client = server.client();
    client.get("/v1/nothing").await.error(404, "unknown_url", None);
    answer(client.request(Method::PUT, CHAT)).await.error(405, "method_not_allowed", None);
    let text = client.request(Method::POST, CHAT).header("content-type", "text/plain").body("{}");
    answer(text).await.error(415, "unsupported_media_type", None);
    for body in ["", "{", "[]", "null", "{\"model\":\"tiny\",}"] {
        let sent = client.request(Method::POST, CHAT).header("content-type", "application/json").body(body);
        answer(sent).await.error(400, "invalid_json", None);
    }
    let huge = vec![b' '; (16 << 20) + 1];
    let sent = client.request(Method::POST, CHAT).header("content-type", "application/json").body(huge);
    answer(sent).await.error(413, "body_too_large", None);
    let form = client.request(Method::POST, "/v1/files").json(&json!({}));
    answer(form).await.error(415, "unsupported_media_type", None);
    for id in ["file-none", "..%2F..%2Fetc", "%00", "%F0%9F%98%80"] {
        assert_eq!(client.get(&format!("/v1/files/{id}")).await.status, 404, "{id}");
    }
}

#[tokio::test]
async fn uploads_have_a_purpose_a_name_and_a_limit() {
    use reqwest::multipart::{Form, Part};
    let server = Server::with(&["--max-upload", "1000"]);
    let client = server.client();
    let send = |form: Form| answer(client.request(Method::POST, "/v1/files").multipart(form));
    let file = |bytes: Vec<u8>, name: &str| Part::bytes(bytes).file_name(name.to_owned());
    let good = || file(chat_rows(1).into_bytes(), "a.jsonl");
    let missing = "missing_required_parameter";
    send(Form::new().part("file", good())).await.error(400, missing, Some("purpose"));
    send(Form::new().text("purpose", "fine-tune")).await.error(400, missing, Some("file"));
    let wrong = Form::new().text("purpose", "fun").part("file", good());
    send(wrong).await.error(400, "invalid_purpose", Some("purpose"));
    let unknown = Form::new().text("purpose", "fine-tune").text("project", "p").part("file", good());
    send(unknown).await.error(400, "unknown_parameter", Some("project"));
    let large = Form::new().text("purpose", "fine-tune").part("file", file(vec![b'a'; 1001], "a"));
    let message = send(large).await.error(413, "file_too_large", None);
    assert!(message.contains("1000"), "{message}");
    let long = Form::new().text("purpose", "fine-tune").part("file", file(b"{}".to_vec(), &"n".repeat(10_000)));
    send(long).await.error(400, "invalid_filename", Some("file"));
    assert_eq!(client.get("/v1/files").await.ok()["data"], json!([]), "nothing was kept");
    // A path in a name is a name.
    let path = Form::new().text("purpose", "fine-tune").part("file", file(chat_rows(1).into_bytes(), "../../x"));
    assert_eq!(send(path).await.ok()["filename"], "../../x");
}

/// Imports an archive of these files.
async fn import(client: &Client, files: &[(String, Vec<u8>)]) -> crate::support::server::Answer {
    let packed = attune::formats::archive::write_zip(files).unwrap();
    let part = reqwest::multipart::Part::bytes(packed).file_name("adapter.zip");
    let form = reqwest::multipart::Form::new().text("model", BASE).part("file", part);
    answer(client.request(Method::POST, "/v1/adapters").multipart(form)).await
}

#[tokio::test]
async fn an_import_that_does_not_fit_the_base_is_refused() {
    let server = Server::start();
    let client = server.client();
    let config = |r: usize| {
        let config = json!({"peft_type": "LORA", "r": r, "lora_alpha": 6.0, "target_modules": ["q_proj"], "bias": "none",
                            "lora_dropout": 0.0, "task_type": "CAUSAL_LM"});
        ("adapter_config.json".to_owned(), config.to_string().into_bytes())
    };
    let weights = |r: usize, layers: usize, value: f32| {
        let bytes = |n: usize| (0..n).flat_map(|i| (value + i as f32 * 1e-3).to_le_bytes()).collect::<Vec<u8>>();
        let mut tensors = Vec::new();
        for layer in 0..layers {
            let name = |m: &str| format!("base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{m}.weight");
            tensors.push((name("A"), vec![r, 64], bytes(r * 64)));
            tensors.push((name("B"), vec![64, r], bytes(r * 64)));
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let dtype = safetensors::Dtype::F32;
            (name.as_str(), safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        ("adapter_model.safetensors".to_owned(), safetensors::serialize(views, None).unwrap())
    };
    let imported = import(&client, &[config(4), weights(4, 2, 0.1)]).await.ok();
    assert_eq!(client.get(&format!("/v1/models/{}", imported["model"].as_str().unwrap())).await.status, 200);
    let bad = [
        ("a wrong shape", vec![config(4), weights(8, 2, 0.1)], "shape"),
        ("a missing tensor", vec![config(4), weights(4, 1, 0.1)], "missing"),
        ("a tensor too many", vec![config(4), weights(4, 3, 0.1)], "layers.2"),
        ("not finite", vec![config(4), weights(4, 2, f32::NAN)], "NaN"),
        ("rank 0", vec![config(0), weights(4, 2, 0.1)], "0"),
        ("cut off", vec![config(4), (weights(4, 2, 0.1).0, weights(4, 2, 0.1).1[..200].to_vec())], ""),
        ("no config", vec![weights(4, 2, 0.1)], "adapter_config.json"),
    ];
    for (name, files, part) in bad {
        let answer = import(&client, &files).await;
        assert_eq!((answer.status, &answer.body["error"]["param"]), (400, &json!("file")), "{name}: {}", answer.body);
        let message = answer.body["error"]["message"].as_str().unwrap();
        assert!(message.contains(part), "{name}: {message}");
    }
    let pickle = [config(4), ("adapter_model.bin".to_owned(), vec![0x80, 2])];
    import(&client, &pickle).await.error(415, "pickle", Some("file"));
    assert_eq!(client.get("/v1/adapters").await.ok()["data"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_job_that_has_ended_cannot_be_steered() {
    let server = Server::start();
    let client = server.client();
    let job = client.trained(&client.file(4).await).await;
    let id = job["id"].as_str().unwrap();
    for verb in ["cancel", "pause", "resume"] {
        // As the SDKs send it: a content type and no body.
        let sent =
            client.request(Method::POST, &format!("{JOBS}/{id}/{verb}")).header("content-type", "application/json");
        let message = answer(sent).await.error(400, "invalid_job_state", None);
        assert!(message.contains("succeeded") && message.contains(verb), "{message}");
    }
    assert_eq!(client.get(&format!("{JOBS}/{id}")).await.ok(), job);
}

#[tokio::test]
async fn a_job_can_be_paused_resumed_and_cancelled() {
    let server = Server::start();
    let client = server.client();
    let file = client.file(8).await;
    let body = json!({"model": BASE, "training_file": file, "training": {"n_epochs": 1000}});
    let job = client.post(JOBS, &body).await.ok();
    let id = job["id"].as_str().unwrap();
    client.delete(&format!("/v1/files/{file}")).await.error(409, "file_in_use", None);
    let steer = |verb: &str| {
        let sent =
            client.request(Method::POST, &format!("{JOBS}/{id}/{verb}")).header("content-type", "application/json");
        answer(sent)
    };
    steer("pause").await.ok();
    client.until(id, "paused").await;
    steer("resume").await.ok();
    client.until(id, "running").await;
    steer("cancel").await.ok();
    let ended = client.end_of(id).await;
    assert_eq!((&ended["status"], &ended["fine_tuned_model"]), (&json!("cancelled"), &Value::Null));
    assert!(ended["finished_at"].is_i64(), "{ended}");
    steer("cancel").await.error(400, "invalid_job_state", None);
    assert_eq!(client.delete(&format!("/v1/files/{file}")).await.ok()["deleted"], true);
}
