//! The adapter of a running job, by its job's name.

use serde_json::json;

use crate::support::server::{BASE, Server};

#[tokio::test]
async fn a_running_job_answers_as_it_is_now() {
    let server = Server::start();
    let client = server.client();
    let file = client.file(6).await;
    let body = json!({
        "model": BASE, "training_file": file, "adapter": {"type": "lora", "r": 4, "alpha": 12},
        "training": {"n_epochs": 1000, "batch_size": 1, "learning_rate": 0.01},
    });
    let job = client.post("/v1/fine_tuning/jobs", &body).await.ok()["id"].as_str().unwrap().to_owned();
    let live = format!("{job}:live");
    let chat = json!({"model": live, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3});
    let mut fingerprints = Vec::<String>::new();
    while fingerprints.len() < 2 {
        let answer = client.post("/v1/chat/completions", &chat).await;
        if answer.status == 404 {
            // It has not begun.
            assert!(fingerprints.is_empty());
            answer.error(404, "model_not_live", Some("model"));
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            continue;
        }
        let answer = answer.ok();
        assert_eq!(answer["model"], live.as_str());
        let fingerprint = answer["system_fingerprint"].as_str().unwrap().to_owned();
        // Another step is another generation.
        if !fingerprints.contains(&fingerprint) {
            fingerprints.push(fingerprint);
        }
    }
    let completion = json!({"model": live, "prompt": "a", "max_tokens": 2, "logprobs": 0, "echo": true});
    client.post("/v1/completions", &completion).await.ok();
    client.post("/v1/embeddings", &json!({"model": live, "input": "a"})).await.ok();
    let message =
        client.post("/v1/classify", &json!({"model": live, "input": {"prompt": "a", "completion": "b"}})).await;
    message.error(400, "wrong_task", Some("model"));

    // Whose it is not, for them there is none.
    let other = server.client_with(&server.create_key("other", "all"));
    let message = other.post("/v1/chat/completions", &chat).await.error(404, "model_not_live", Some("model"));
    assert!(message.contains(&job) && message.contains("not being trained in this process"), "{message}");
    // It has no files that a job could begin with.
    let from_live = json!({"model": live, "training_file": file});
    client.post("/v1/fine_tuning/jobs", &from_live).await.error(404, "model_not_stored", Some("model"));

    client.post(&format!("/v1/fine_tuning/jobs/{job}/cancel"), &json!({})).await.ok();
    client.until(&job, "cancelled").await;
    client.post("/v1/chat/completions", &chat).await.error(404, "model_not_live", Some("model"));
}
