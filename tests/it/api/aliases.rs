//! `/v1/aliases`.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::server::{Answer, BASE, Client, Server, answer};

async fn put(client: &Client, name: &str, body: &Value) -> Answer {
    answer(client.request(Method::PUT, &format!("/v1/aliases/{name}")).json(body)).await
}

#[tokio::test]
async fn an_alias_answers_as_the_adapter_behind_it_and_moves_only_from_where_it_is() {
    let server = Server::start();
    let client = server.client();
    let file = client.file(6).await;
    let mut models = Vec::new();
    for seed in 1..3 {
        let body = json!({"model": BASE, "training_file": file, "seed": seed, "adapter": {"type": "lora", "r": 4, "alpha": 6},
                          "training": {"max_steps": 2, "learning_rate": 0.05}});
        let job = client.post("/v1/fine_tuning/jobs", &body).await.ok();
        models.push(client.end_of(job["id"].as_str().unwrap()).await["fine_tuned_model"].clone());
    }
    let said = async |model: &Value| {
        let body = json!({"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4,
                          "temperature": 0, "ignore_eos": true, "logprobs": true});
        let answer = client.post("/v1/chat/completions", &body).await.ok();
        (answer["choices"].clone(), answer["system_fingerprint"].clone())
    };
    let (first, second) = (said(&models[0]).await, said(&models[1]).await);
    assert_ne!(first, second);
    let alias = json!("support-live");
    let new = json!({"model": models[0], "expected_generation": null});
    let made = put(&client, "support-live", &new).await.ok();
    assert_eq!((&made["id"], &made["model"], &made["generation"]), (&alias, &models[0], &first.1));
    assert_eq!(said(&alias).await, first);
    let message = put(&client, "support-live", &new).await.error(409, "alias_moved", Some("expected_generation"));
    assert!(message.contains(first.1.as_str().unwrap()), "{message}");
    let stale = json!({"model": models[1], "expected_generation": second.1});
    put(&client, "support-live", &stale).await.error(409, "alias_moved", Some("expected_generation"));
    assert_eq!(said(&alias).await, first);
    let right = json!({"model": models[1], "expected_generation": first.1});
    put(&client, "support-live", &right).await.ok();
    assert_eq!(said(&alias).await, second);
    put(&client, "a", &json!({"model": models[0]})).await.ok();
    put(&client, "a", &json!({"model": models[1]})).await.ok();
    let page = client.get("/v1/aliases?limit=1").await.ok();
    assert_eq!((&page["data"][0]["id"], &page["has_more"]), (&json!("a"), &json!(true)));
    let page = client.get("/v1/aliases?after=a").await.ok();
    assert_eq!(page["data"][0]["id"], alias);

    // It is another's name for nothing, and goes with its adapter.
    let other = server.client_with(&server.create_key("other", "all"));
    assert_eq!(other.get("/v1/aliases/support-live").await.status, 404);
    put(&other, "mine", &json!({"model": models[0]})).await.error(404, "model_not_found", Some("model"));
    for (name, body, code, param) in [
        ("no%20good", json!({"model": models[0]}), "invalid_name", "alias"),
        (BASE, json!({"model": models[0]}), "name_taken", "alias"),
        ("b", json!({"model": models[0], "extra": 1}), "unknown_parameter", "extra"),
        ("b", json!({}), "missing_required_parameter", "model"),
        ("b", json!({"model": 1}), "invalid_type", "model"),
    ] {
        put(&client, name, &body).await.error(400, code, Some(param));
    }
    put(&client, "b", &json!({"model": BASE})).await.error(404, "model_not_found", Some("model"));
    client.delete("/v1/aliases/a").await.ok();
    client.delete("/v1/aliases/a").await.error(404, "not_found", Some("id"));
    assert_eq!(said(&models[1]).await, second, "the adapter stays");
    client.delete(&format!("/v1/models/{}", models[1].as_str().unwrap())).await.ok();
    let gone = json!({"model": alias, "messages": [{"role": "user", "content": "Hi"}]});
    client.post("/v1/chat/completions", &gone).await.error(404, "model_not_found", Some("model"));
}
