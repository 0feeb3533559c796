//! `Idempotency-Key`: the same request is answered again, and makes nothing again.

use reqwest::{Method, multipart};
use serde_json::{Value, json};

use crate::support::server::{Answer, BASE, Client, Server, answer, chat_rows};

const JOBS: &str = "/v1/fine_tuning/jobs";

async fn ids(client: &Client, path: &str) -> Vec<String> {
    let list = client.get(path).await.ok();
    list["data"].as_array().unwrap().iter().map(|entry| entry["id"].as_str().unwrap().to_owned()).collect()
}

/// A form's boundary is another each time: only its content counts.
async fn upload(client: &Client, key: &str, rows: usize) -> Answer {
    let file = multipart::Part::bytes(chat_rows(rows).into_bytes()).file_name("rows.jsonl");
    let form = multipart::Form::new().text("purpose", "fine-tune").part("file", file);
    answer(client.request(Method::POST, "/v1/files").header("idempotency-key", key).multipart(form)).await
}

#[tokio::test]
async fn a_job_is_made_once() {
    let server = Server::start();
    let client = server.client();
    let body = json!({"model": BASE, "training_file": client.file(6).await, "training": {"max_steps": 1}});
    let job = client.post_once("one", JOBS, &body).await.ok();
    let ended = client.end_of(job["id"].as_str().unwrap()).await;
    assert_eq!(ended["status"], "succeeded", "{ended}");
    // Its file may be gone: the answer is what it was.
    client.delete(&format!("/v1/files/{}", body["training_file"].as_str().unwrap())).await.ok();
    assert_eq!(client.post_once("one", JOBS, &body).await.ok(), job);

    let other = json!({"model": BASE, "training_file": body["training_file"], "training": {"max_steps": 2}});
    let message =
        client.post_once("one", JOBS, &other).await.error(422, "idempotency_key_reused", Some("Idempotency-Key"));
    assert!(message.contains("24 hours"), "{message}");
    upload(&client, "one", 3).await.error(422, "idempotency_key_reused", Some("Idempotency-Key"));
    assert_eq!(ids(&client, JOBS).await, [job["id"].as_str().unwrap()]);

    // Another project's keys are its own, and a request that made nothing leaves its key free.
    let stranger = server.client_with(&server.create_key("other", "all"));
    let mut theirs = json!({"model": BASE, "training_file": "file-none", "training": {"max_steps": 1}});
    stranger.post_once("one", JOBS, &theirs).await.error(404, "not_found", Some("training_file"));
    theirs["training_file"] = json!(stranger.file(2).await);
    theirs["dry_run"] = json!(true);
    stranger.post_once("one", JOBS, &theirs).await.ok();
    theirs["dry_run"] = json!(false);
    let made = stranger.post_once("one", JOBS, &theirs).await.ok();
    assert_eq!(ids(&stranger, JOBS).await, [made["id"].as_str().unwrap()]);

    for key in ["", &"k".repeat(256), "ä"] {
        client.post_once(key, JOBS, &body).await.error(400, "invalid_idempotency_key", Some("Idempotency-Key"));
    }
}

#[tokio::test]
async fn requests_at_once_make_one_job() {
    let server = Server::start();
    let client = server.client();
    let body = json!({"model": BASE, "training_file": client.file(6).await, "training": {"max_steps": 1}});
    for round in 0..5 {
        let key = format!("round {round}");
        let answers = futures::future::join_all((0..6).map(|_| client.post_once(&key, JOBS, &body))).await;
        let answers: Vec<Value> = answers.into_iter().map(Answer::ok).collect();
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:#?}");
        assert_eq!(ids(&client, JOBS).await.len(), round + 1);
    }
}

#[tokio::test]
async fn a_file_is_kept_once() {
    let server = Server::start();
    let client = server.client();
    let first = upload(&client, "up", 5).await.ok();
    let uploads = futures::future::join_all((0..4).map(|_| upload(&client, "up", 5))).await;
    for again in uploads {
        assert_eq!(again.ok(), first);
    }
    upload(&client, "up", 4).await.error(422, "idempotency_key_reused", Some("Idempotency-Key"));
    assert_eq!(ids(&client, "/v1/files").await, [first["id"].as_str().unwrap()]);
    let kept = std::fs::read_dir(server.data().join("blobs/files")).unwrap();
    assert_eq!(kept.count(), 1, "the bytes of the others are gone");
    assert_ne!(upload(&client, "other", 5).await.ok()["id"], first["id"]);
}

#[tokio::test]
async fn an_adapter_is_imported_once() {
    let server = Server::start();
    let client = server.client();
    let job = client.trained(&client.file(4).await).await;
    let model = job["fine_tuned_model"].as_str().unwrap();
    let packed = client.request(Method::GET, &format!("/v1/adapters/{model}/download")).send().await.unwrap();
    let packed = packed.error_for_status().unwrap().bytes().await.unwrap().to_vec();
    let import = async |suffix: &str| {
        let form = multipart::Form::new().text("model", BASE).text("suffix", suffix.to_owned());
        let form = form.part("file", multipart::Part::bytes(packed.clone()).file_name("a.zip"));
        answer(client.request(Method::POST, "/v1/adapters").header("idempotency-key", "in").multipart(form)).await
    };
    let before = ids(&client, "/v1/adapters").await.len();
    let first = import("mine").await.ok();
    assert_eq!(import("mine").await.ok(), first);
    import("yours").await.error(422, "idempotency_key_reused", Some("Idempotency-Key"));
    assert_eq!(ids(&client, "/v1/adapters").await.len(), before + 1);
}
