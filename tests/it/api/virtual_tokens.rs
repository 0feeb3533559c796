//! Adapters whose prompts and prefixes take a part of the context, from the job to the answer.

use reqwest::{Method, multipart};
use serde_json::{Value, json};

use crate::support::{
    server::{BASE, Client, Server, answer},
    tiny::Random,
};

const COMPLETE: &str = "/v1/completions";
const JOBS: &str = "/v1/fine_tuning/jobs";

/// A prompt of 20 random rows, as PEFT stores it.
async fn import(client: &Client, peft_type: &str) -> Value {
    let mut random = Random(3);
    let bytes: Vec<u8> = (0..20 * 64).flat_map(|_| (0.5 * random.normal()).to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![20, 64], &bytes).unwrap();
    let config = json!({"peft_type": peft_type, "task_type": "CAUSAL_LM", "num_virtual_tokens": 20, "token_dim": 64});
    let files = [
        ("adapter_config.json".to_owned(), config.to_string().into_bytes()),
        ("adapter_model.safetensors".to_owned(), safetensors::serialize([("prompt_embeddings", view)], None).unwrap()),
    ];
    let packed = attune::formats::archive::write_zip(&files).unwrap();
    let part = multipart::Part::bytes(packed).file_name("adapter.zip");
    let form = multipart::Form::new().text("model", BASE).part("file", part);
    answer(client.request(Method::POST, "/v1/adapters").multipart(form)).await.ok()
}

#[tokio::test]
async fn virtual_tokens_count_against_the_context() {
    let server = Server::start();
    let client = server.client();
    let model = import(&client, "PROMPT_TUNING").await["model"].clone();
    let object = client.get(&format!("/v1/models/{}", model.as_str().unwrap())).await.ok();
    assert_eq!(object["context_length"], 512 - 20);
    let body = |prompt: usize, max_tokens: u64| {
        json!({"model": model, "prompt": vec![7; prompt], "max_tokens": max_tokens, "ignore_eos": true,
               "temperature": 0})
    };
    // All that fits, asked for and (in chat) by default; usage counts what the user sees.
    let usage = &client.post(COMPLETE, &body(489, 3)).await.ok()["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(489), &json!(3)));
    let chat = json!({"model": model, "messages": [{"role": "user", "content": "a".repeat(430)}], "ignore_eos": true,
                      "temperature": 0});
    assert_eq!(client.post("/v1/chat/completions", &chat).await.ok()["usage"]["total_tokens"], 492);
    let message = client.post(COMPLETE, &body(489, 4)).await.error(400, "context_length_exceeded", Some("max_tokens"));
    assert!(message.contains("492"), "{message}");
    let message = client.post(COMPLETE, &body(493, 1)).await.error(400, "context_length_exceeded", Some("prompt"));
    assert!(message.contains("493") && message.contains("492"), "{message}");
}

#[tokio::test]
async fn a_job_leaves_room_for_its_virtual_tokens() {
    let server = Server::start();
    let client = server.client();
    let file = client.file(4).await;
    let adapter = json!({"type": "p_tuning_v2", "num_virtual_tokens": 4});
    let ask = json!({"model": BASE, "training_file": file, "adapter": adapter, "training": {"max_steps": 2}});
    let mut long = ask.clone();
    long["training"]["max_seq_len"] = json!(509);
    let message = client.post(JOBS, &long).await.error(400, "spec_out_of_range", Some("training.max_seq_len"));
    assert!(message.contains("2 to 508: the context of 512 without 4 virtual tokens"), "{message}");

    let job = client.post(JOBS, &ask).await.ok();
    assert_eq!(job["training"]["max_seq_len"], 508);
    let job = client.end_of(job["id"].as_str().unwrap()).await;
    let model = job["fine_tuned_model"].as_str().unwrap_or_else(|| panic!("{job}"));
    let object = client.get(&format!("/v1/models/{model}")).await.ok();
    assert_eq!(object["context_length"], 508);
    let answer = client.post(COMPLETE, &json!({"model": model, "prompt": "Hi", "max_tokens": 2})).await.ok();
    assert_eq!(answer["usage"]["prompt_tokens"], 2);
    // The preset's files are prefix tuning's, and go on as such.
    let again = json!({"model": model, "training_file": file, "dry_run": true});
    let again = client.post(JOBS, &again).await.ok();
    assert_eq!(
        (&again["adapter"]["type"], &again["adapter"]["num_virtual_tokens"]),
        (&json!("prefix_tuning"), &json!(4))
    );
}

/// What an encoder made goes on without it, and the job says so.
#[tokio::test]
async fn a_job_that_continues_p_tuning_says_that_it_trains_a_prompt() {
    let server = Server::start();
    let client = server.client();
    let imported = import(&client, "P_TUNING").await;
    assert_eq!(imported["type"], "p_tuning");
    let ask = json!({"model": imported["model"], "training_file": client.file(4).await,
                     "training": {"max_steps": 1, "learning_rate": 0.01}});
    let job = client.post(JOBS, &ask).await.ok();
    assert_eq!((&job["adapter"]["type"], &job["adapter"]["num_virtual_tokens"]), (&json!("prompt_tuning"), &json!(20)));
    let job = client.end_of(job["id"].as_str().unwrap()).await;
    let adapter = client.get(&format!("/v1/adapters/{}", job["fine_tuned_model"].as_str().unwrap())).await.ok();
    assert_eq!(adapter["type"], "prompt_tuning");
}
