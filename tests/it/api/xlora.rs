//! X-LoRA through the wire: a gate over two tuned models, from the job to the answer, out and in again.

use attune::formats::archive;
use reqwest::{Method, multipart};
use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server, answer};

const JOBS: &str = "/v1/fine_tuning/jobs";

async fn trained(client: &Client, file: &str, adapter: Value, suffix: &str) -> String {
    let training = json!({"max_steps": 4, "batch_size": 4, "learning_rate": 0.02});
    let body =
        json!({"model": BASE, "training_file": file, "adapter": adapter, "training": training, "suffix": suffix});
    let job = client.post(JOBS, &body).await.ok();
    let job = client.end_of(job["id"].as_str().unwrap()).await;
    job["fine_tuned_model"].as_str().unwrap_or_else(|| panic!("{job}")).to_owned()
}

#[tokio::test]
async fn tuned_models_are_mixed() {
    let server = Server::start();
    let client = server.client();
    let file = client.file(7).await;
    let one = trained(&client, &file, json!({"type": "lora", "r": 3, "alpha": 7}), "one").await;
    // A low-rank change of another method is folded into LoRA.
    let two = trained(&client, &file, json!({"type": "adalora", "init_r": 4, "target_r": 2, "alpha": 9}), "two").await;
    let other = trained(&client, &file, json!({"type": "ia3"}), "other").await;

    let body = |adapters: Value| json!({"model": BASE, "training_file": file, "adapter": {"type": "xlora", "adapters": adapters}});
    for (adapters, status, code, param) in [
        (json!([one, "ft:none"]), 404, "model_not_found", "adapter.adapters[1]"),
        (json!([BASE, one]), 400, "not_an_adapter", "adapter.adapters[0]"),
        (json!([one, two, other]), 400, "invalid_adapter", "adapter.adapters[2]"),
        (json!([one]), 400, "spec_out_of_range", "adapter.adapters"),
    ] {
        client.post(JOBS, &body(adapters)).await.error(status, code, Some(param));
    }
    let adapter = json!({"type": "xlora", "adapters": [one, two], "layerwise_scalings": true});
    let estimate = client.post("/v1/fine_tuning/estimate", &body(json!([one, two]))).await.ok();
    assert_eq!(estimate["trainable_parameters"], 2 * 64 + 2);
    let mixed = trained(&client, &file, adapter, "mixed").await;

    let chat = async |model: &str| {
        let message = json!({"role": "user", "content": "Question 3"});
        let body = json!({"model": model, "messages": [message], "max_tokens": 6, "temperature": 0, "logprobs": true});
        client.post("/v1/chat/completions", &body).await.ok()["choices"][0]["logprobs"].clone()
    };
    let (first, second) = tokio::join!(chat(&mixed), chat(&one));
    assert_ne!(first, second);
    assert_ne!(first, chat(BASE).await);

    let path = format!("/v1/adapters/{mixed}/download");
    let packed = client.request(Method::GET, &path).send().await.unwrap().error_for_status().unwrap();
    let packed = packed.bytes().await.unwrap().to_vec();
    let inside = archive::read_adapter(&packed, 1 << 30).unwrap();
    let paths: Vec<&str> = inside.iter().map(|(path, _)| path.as_str()).collect();
    let names = ["adapter_config.json", "adapter_model.safetensors"];
    assert_eq!(paths, ["", "0/", "1/"].map(|folder| names.map(|name| format!("{folder}{name}"))).concat());
    let part = multipart::Part::bytes(packed).file_name("adapter.zip");
    let form = multipart::Form::new().text("model", BASE).part("file", part);
    let imported = answer(client.request(Method::POST, "/v1/adapters").multipart(form)).await.ok();
    let original = client.get(&format!("/v1/adapters/{mixed}")).await.ok();
    assert_eq!((&imported["type"], &imported["generation"]), (&json!("xlora"), &original["generation"]));

    // It holds copies: the adapters that it was made of may go.
    for name in [&one, &two] {
        assert_eq!(client.delete(&format!("/v1/models/{name}")).await.status, 200);
    }
    assert_eq!(chat(imported["model"].as_str().unwrap()).await, first);
    let again = json!({"model": mixed, "training_file": file, "training": {"max_steps": 1}});
    let job = client.post(JOBS, &again).await.ok();
    let job = client.end_of(job["id"].as_str().unwrap()).await;
    assert_eq!((&job["status"], &job["adapter"]["type"]), (&json!("succeeded"), &json!("xlora")), "{job}");
}
