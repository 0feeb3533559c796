//! What a job needs is said before it is queued, and a job that does not fit fails with what would.

use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server};

const ESTIMATE: &str = "/v1/fine_tuning/estimate";
const JOBS: &str = "/v1/fine_tuning/jobs";

async fn body(client: &Client, adapter: Value) -> Value {
    json!({"model": BASE, "training_file": client.file(24).await, "adapter": adapter,
           "training": {"optimizer": "adamw_8bit", "gradient_checkpointing": true}})
}

#[tokio::test]
async fn an_estimate_says_what_a_job_would_need() {
    let server = Server::start();
    let client = server.client();
    let body = body(&client, json!({"type": "lora", "r": 3})).await;
    let found = client.post(ESTIMATE, &body).await.ok();
    assert_eq!(found["object"], "fine_tuning.estimate");
    assert_eq!((&found["rows"], &found["left_out_rows"]), (&json!(24), &json!(0)));
    assert_eq!(found["adapter"]["r"], 3);
    assert_eq!(found["training"]["optimizer"], "adamw_8bit");
    assert_eq!(found["training"]["gradient_checkpointing"], true);
    // Seven linears of two layers.
    let values: u64 = 2 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96));
    assert_eq!(found["trainable_parameters"], values);
    assert_eq!(found["steps"], 72);
    for positive in ["tokens", "trained_tokens", "seconds", "tokens_per_second", "adapter_bytes", "base_memory"] {
        assert!(found[positive].as_f64().unwrap() > 0.0, "{positive}: {found}");
    }
    assert!(found["memory"]["peak"].as_u64() > found["memory"]["activations"].as_u64(), "{found}");
    assert_eq!(found["fits"], true);
    let advice = found["recommendations"].as_array().unwrap();
    assert_eq!(advice[0]["adapter"]["type"], "lora", "{advice:?}");
    assert!(advice.iter().all(|one| one["reason"].as_str().is_some_and(|reason| reason.len() > 10)));
    assert!(client.get(JOBS).await.ok()["data"].as_array().unwrap().is_empty(), "nothing is queued");

    // The job has the same numbers to say: the settings are echoed and the events count the same tokens.
    let job = client.post(JOBS, &body).await.ok();
    assert_eq!((&job["training"], &job["adapter"]), (&found["training"], &found["adapter"]));
    let ended = client.end_of(job["id"].as_str().unwrap()).await;
    assert_eq!(ended["trained_tokens"].as_u64().unwrap(), 3 * found["trained_tokens"].as_u64().unwrap());
}

#[tokio::test]
async fn auto_takes_the_first_recommendation() {
    let server = Server::start();
    let client = server.client();
    let body = body(&client, json!({"type": "auto"})).await;
    let first = client.post(ESTIMATE, &body).await.ok()["recommendations"][0]["adapter"]["type"].clone();
    let mut dry = body.clone();
    dry["dry_run"] = json!(true);
    let job = client.post(JOBS, &dry).await.ok();
    assert_eq!(job["adapter"]["type"], first);
    let mut wrong = body;
    wrong["adapter"]["r"] = json!(4);
    client.post(ESTIMATE, &wrong).await.error(400, "spec_unknown_field", Some("adapter.r"));
}

#[tokio::test]
async fn a_job_that_does_not_fit_says_what_would() {
    let server = Server::with(&["--memory-limit", "1000000"]);
    let client = server.client();
    let file = client.file(24).await;
    let body = |batch: u64| {
        json!({"model": BASE, "training_file": file, "adapter": {"type": "lora", "r": 4, "alpha": 12},
               "method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": batch, "n_epochs": 1}}}})
    };
    let job = client.post(JOBS, &body(24)).await.ok();
    let ended = client.end_of(job["id"].as_str().unwrap()).await;
    assert_eq!(ended["status"], "failed", "{ended}");
    assert_eq!((&ended["error"]["code"], &ended["error"]["param"]), (&json!("out_of_memory"), &json!("training")));
    let message = ended["error"]["message"].as_str().unwrap();
    for part in ["976.6 KiB are available", "training.gradient_checkpointing true", "batch_size 1", "which fits"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let estimate = client.post(ESTIMATE, &body(24)).await.ok();
    assert_eq!((&estimate["fits"], &estimate["available_memory"]), (&json!(false), &json!(1_000_000)));
    // As advised.
    let job = client.post(JOBS, &body(1)).await.ok();
    let ended = client.end_of(job["id"].as_str().unwrap()).await;
    assert_eq!(ended["status"], "succeeded", "{ended}");
}
