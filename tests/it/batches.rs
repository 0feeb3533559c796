//! `/v1/batches` on the real binary: answers in order, errors by line, cancellation, time that runs out, SIGKILL.

use std::time::Duration;

use reqwest::{Method, multipart};
use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server, answer};

const CHAT: &str = "/v1/chat/completions";

fn chat(tokens: u64, i: usize) -> Value {
    json!({"model": BASE, "messages": [{"role": "user", "content": format!("Question {i}")}], "max_tokens": tokens,
           "temperature": 0, "ignore_eos": true})
}

fn line(id: &str, url: &str, body: &Value) -> String {
    json!({"custom_id": id, "method": "POST", "url": url, "body": body}).to_string() + "\n"
}

/// So many chats of so many tokens.
/// Requests that take a while.
const MANY: usize = 3000;

fn chats(n: usize, tokens: u64) -> String {
    (0..n).map(|i| line(&format!("r{i}"), CHAT, &chat(tokens, i))).collect()
}

async fn file(client: &Client, purpose: &str, content: String) -> String {
    let part = multipart::Part::bytes(content.into_bytes()).file_name("requests.jsonl");
    let form = multipart::Form::new().text("purpose", purpose.to_owned()).part("file", part);
    let made = answer(client.request(Method::POST, "/v1/files").multipart(form)).await.ok();
    made["id"].as_str().unwrap().to_owned()
}

async fn batch(client: &Client, endpoint: &str, window: &str, content: String) -> String {
    let input = file(client, "batch", content).await;
    let body = json!({"input_file_id": input, "endpoint": endpoint, "completion_window": window,
                      "metadata": {"run": "7"}});
    let made = client.post("/v1/batches", &body).await.ok();
    assert_eq!((&made["status"], &made["object"]), (&json!("validating"), &json!("batch")));
    assert_eq!((&made["metadata"]["run"], &made["input_file_id"]), (&json!("7"), &json!(input)));
    made["id"].as_str().unwrap().to_owned()
}

async fn now(client: &Client, id: &str) -> Value {
    client.get(&format!("/v1/batches/{id}")).await.ok()
}

async fn until(client: &Client, id: &str, holds: impl Fn(&Value) -> bool) -> Value {
    loop {
        let now = now(client, id).await;
        if holds(&now) {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn end(client: &Client, id: &str) -> Value {
    until(client, id, |now| matches!(now["status"].as_str(), Some("completed" | "failed" | "expired" | "cancelled")))
        .await
}

/// The lines of a file of results.
async fn results(client: &Client, file: &Value) -> Vec<Value> {
    let Some(id) = file.as_str() else { return Vec::new() };
    let about = client.get(&format!("/v1/files/{id}")).await.ok();
    assert_eq!(about["purpose"], "batch_output");
    let text = client.request(Method::GET, &format!("/v1/files/{id}/content")).send().await.unwrap();
    let text = text.error_for_status().unwrap().text().await.unwrap();
    assert_eq!(about["bytes"], text.len());
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["custom_id"].as_str().unwrap()).collect()
}

/// The custom id and the text of each answer.
fn texts(lines: &[Value]) -> Vec<(&str, &str)> {
    lines
        .iter()
        .map(|line| {
            let content = line["response"]["body"]["choices"][0]["message"]["content"].as_str().unwrap();
            (line["custom_id"].as_str().unwrap(), content)
        })
        .collect()
}

#[tokio::test]
async fn answers_are_those_of_the_endpoint_and_errors_come_by_request() {
    let server = Server::start();
    let client = server.client();
    let mut content = chats(3, 9);
    content += &line("none", CHAT, &json!({"model": "none", "messages": [{"role": "user", "content": "Hi"}]}));
    content += "\n";
    content += &line("streamed", CHAT, &json!({"model": BASE, "messages": [], "stream": true}));
    content += line("last", CHAT, &chat(4, 9)).trim_end();
    let id = batch(&client, CHAT, "24h", content).await;
    let ended = end(&client, &id).await;
    assert_eq!(ended["status"], "completed", "{ended}");
    assert_eq!(ended["request_counts"], json!({"total": 6, "completed": 4, "failed": 2}));
    let usage = &ended["usage"];
    assert_eq!(usage["output_tokens"], 3 * 9 + 4, "{ended}");
    assert!(usage["total_tokens"].as_i64() > usage["output_tokens"].as_i64());
    for field in ["in_progress_at", "finalizing_at", "completed_at"] {
        assert!(ended[field].is_i64(), "{field}: {ended}");
    }
    assert_eq!(ended["expires_at"].as_i64().unwrap() - ended["created_at"].as_i64().unwrap(), 86_400);
    let answers = results(&client, &ended["output_file_id"]).await;
    assert_eq!(ids(&answers), ["r0", "r1", "r2", "last"]);
    for (answer, body) in answers.iter().zip([chat(9, 0), chat(9, 1), chat(9, 2), chat(4, 9)]) {
        let live = client.post(CHAT, &body).await.ok();
        assert_eq!(answer["response"]["status_code"], 200);
        assert_eq!(answer["response"]["body"]["choices"], live["choices"]);
        assert!(answer["error"].is_null() && answer["id"].as_str().unwrap().starts_with("batch_req_"));
    }
    let errors = results(&client, &ended["error_file_id"]).await;
    let found = |line: &Value| {
        let response = &line["response"];
        (line["custom_id"].clone(), response["status_code"].clone(), response["body"]["error"]["param"].clone())
    };
    assert_eq!(
        errors.iter().map(found).collect::<Vec<_>>(),
        [(json!("none"), json!(404), json!("model")), (json!("streamed"), json!(400), json!("stream"))]
    );
    let listed = client.get("/v1/batches?limit=1").await.ok();
    assert_eq!((&listed["data"][0]["id"], &listed["has_more"]), (&json!(id), &json!(false)));
    client.post(&format!("/v1/batches/{id}/cancel"), &json!({})).await.error(409, "invalid_batch_state", Some("id"));
}

#[tokio::test]
async fn completions_and_embeddings_too() {
    let server = Server::start();
    let client = server.client();
    let (complete, embed) = ("/v1/completions", "/v1/embeddings");
    let body = json!({"model": BASE, "prompt": "abc", "max_tokens": 3, "ignore_eos": true});
    let first = batch(&client, complete, "24h", line("a", complete, &body)).await;
    let body = json!({"model": BASE, "input": ["a", "b"]});
    let second = batch(&client, embed, "24h", line("a", embed, &body)).await;
    let (first, second) = (end(&client, &first).await, end(&client, &second).await);
    let of =
        async |ended: &Value| results(&client, &ended["output_file_id"]).await.remove(0)["response"]["body"].take();
    assert_eq!(of(&first).await["usage"]["completion_tokens"], 3);
    assert_eq!(of(&second).await["data"].as_array().unwrap().len(), 2);
    assert_eq!((&first["model"], &first["error_file_id"]), (&json!(BASE), &Value::Null));
}

#[tokio::test]
async fn a_wrong_file_fails_by_line() {
    let server = Server::start();
    let client = server.client();
    let good = chat(1, 0);
    let mut content = line("a", CHAT, &good);
    content += "{\"custom_id\": \"b\"\n";
    content += &line("a", CHAT, &good);
    content += &line("c", "/v1/embeddings", &good);
    content += &line("", CHAT, &good);
    content += &line("d", CHAT, &json!([1]));
    content += &line("e", CHAT, &good).replace("POST", "GET");
    content += &line("f", CHAT, &good).replace("\"url\"", "\"extra\": 1, \"url\"");
    let id = batch(&client, CHAT, "24h", content).await;
    let ended = end(&client, &id).await;
    assert_eq!((&ended["status"], &ended["errors"]["object"]), (&json!("failed"), &json!("list")));
    let found: Vec<_> = ended["errors"]["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["line"].as_u64().unwrap(), e["code"].as_str().unwrap()))
        .collect();
    assert_eq!(
        found,
        [
            (2, "invalid_json_line"),
            (3, "duplicate_custom_id"),
            (4, "invalid_url"),
            (5, "invalid_custom_id"),
            (6, "invalid_body"),
            (7, "invalid_method"),
            (8, "unknown_parameter"),
        ]
    );
    assert!(ended["failed_at"].is_i64() && ended["output_file_id"].is_null());
    let empty = end(&client, &batch(&client, CHAT, "24h", "\n\n".to_owned()).await).await;
    assert_eq!(empty["errors"]["data"][0]["code"], "empty_file");
}

#[tokio::test]
async fn a_cancelled_batch_keeps_what_was_answered() {
    let server = Server::start();
    let client = server.client();
    // More than any machine answers between two looks at whether to go on.
    let content = chats(MANY, 400);
    let id = batch(&client, CHAT, "24h", content).await;
    let running = until(&client, &id, |now| now["request_counts"]["completed"].as_i64() > Some(2)).await;
    let input = running["input_file_id"].as_str().unwrap();
    client.delete(&format!("/v1/files/{input}")).await.error(409, "file_in_use", None);
    // Whoever waits for an answer comes first.
    client.post(CHAT, &chat(5, 1)).await.ok();
    assert_eq!(now(&client, &id).await["status"], "in_progress");
    let cancelling = client.post(&format!("/v1/batches/{id}/cancel"), &json!({})).await.ok();
    assert_eq!(cancelling["status"], "cancelling");
    let ended = end(&client, &id).await;
    assert_eq!(ended["status"], "cancelled", "{ended}");
    let answers = results(&client, &ended["output_file_id"]).await;
    assert_eq!(ended["request_counts"]["completed"], answers.len());
    assert!((3..MANY).contains(&answers.len()), "{}", answers.len());
    client.delete(&format!("/v1/files/{input}")).await.ok();
}

#[tokio::test]
async fn what_the_window_leaves_is_said() {
    let server = Server::start();
    let client = server.client();
    let id = batch(&client, CHAT, "2s", chats(MANY, 400)).await;
    let ended = end(&client, &id).await;
    assert_eq!(ended["status"], "expired", "{ended}");
    let (answers, errors) =
        (results(&client, &ended["output_file_id"]).await, results(&client, &ended["error_file_id"]).await);
    assert_eq!(answers.len() + errors.len(), MANY);
    assert!(errors.iter().all(|line| line["error"]["code"] == "batch_expired" && line["response"].is_null()));
    assert_eq!(ended["request_counts"]["failed"], errors.len());
    assert!(ended["expired_at"].as_i64() >= ended["expires_at"].as_i64());
}

#[tokio::test]
async fn a_killed_server_loses_no_answer_and_counts_none_twice() {
    let mut server = Server::start();
    let content = chats(60, 40);
    let whole = end(&server.client(), &batch(&server.client(), CHAT, "24h", content.clone()).await).await;
    let expected = results(&server.client(), &whole["output_file_id"]).await;
    let id = batch(&server.client(), CHAT, "24h", content).await;
    for done in [1, 20, 40] {
        until(&server.client(), &id, |now| now["request_counts"]["completed"].as_i64() >= Some(done)).await;
        server.kill_and_restart();
    }
    let client = server.client();
    let ended = end(&client, &id).await;
    assert_eq!(ended["request_counts"], json!({"total": 60, "completed": 60, "failed": 0}), "{ended}");
    let answers = results(&client, &ended["output_file_id"]).await;
    assert_eq!(texts(&answers), texts(&expected));
    assert_eq!(ended["usage"], whole["usage"]);
}

#[tokio::test]
async fn requests_for_batches_are_refused_by_field() {
    let server = Server::start();
    let client = server.client();
    let (good, other) = (file(&client, "batch", chats(1, 1)).await, file(&client, "user_data", "{}".to_owned()).await);
    let body = json!({"input_file_id": good, "endpoint": CHAT, "completion_window": "24h"});
    for (field, value, status, code) in [
        ("input_file_id", json!("file-none"), 404, "not_found"),
        ("input_file_id", json!(other), 400, "wrong_purpose"),
        ("input_file_id", json!(7), 400, "invalid_type"),
        ("endpoint", json!("/v1/models"), 400, "out_of_range"),
        ("completion_window", json!("25h"), 400, "out_of_range"),
        ("metadata", json!({"a": 1}), 400, "invalid_metadata"),
        ("output_expires_after", json!({"anchor": "created_at", "seconds": 3600}), 400, "unsupported_parameter"),
        ("extra", json!(1), 400, "unknown_parameter"),
    ] {
        let mut body = body.clone();
        body[field] = value;
        client.post("/v1/batches", &body).await.error(status, code, Some(field));
    }
    for path in ["/v1/batches/batch_none", "/v1/batches?after=batch_none"] {
        assert_eq!(client.get(path).await.status, 404);
    }
    let made = client.post_once("k", "/v1/batches", &body).await.ok();
    assert_eq!(client.post_once("k", "/v1/batches", &body).await.ok()["id"], made["id"]);
}
