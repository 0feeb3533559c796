//! Full fine-tuning through the wire: trained, served beside the base, out and in again; refused where it cannot be.

use candle_core::quantized::GgmlDType;
use reqwest::{Method, multipart};
use serde_json::{Value, json};

use crate::support::{
    quantised,
    server::{BASE, Server, answer},
    tiny::Tiny,
};

#[tokio::test]
async fn all_weights_are_trained_and_served() {
    let dir = tempfile::tempdir().unwrap();
    let few = dir.path().join("few.gguf");
    quantised::write(&Tiny::default(), &few, GgmlDType::Q4_1);
    let server = Server::with(&["--model", &format!("few={}", few.display())]);
    let client = server.client();
    let file = client.file(7).await;
    let body = |model: &str, adapter: Value| {
        let training = json!({"n_epochs": 2, "batch_size": 4, "learning_rate": 0.003});
        json!({"model": model, "training_file": file, "adapter": adapter, "training": training})
    };
    let jobs = "/v1/fine_tuning/jobs";
    let refused = client.post(jobs, &body("few", json!({"type": "full"}))).await;
    let message = refused.error(400, "spec_unsupported", Some("adapter.type"));
    assert!(message.contains("few is held as Q4_1") && message.contains("F32, F16, BF16"), "{message}");
    client.post(jobs, &body(BASE, json!({"type": "full", "r": 2}))).await.error(
        400,
        "spec_unknown_field",
        Some("adapter.r"),
    );

    let job = client.post(jobs, &body(BASE, json!({"type": "full"}))).await.ok();
    let job = client.end_of(job["id"].as_str().unwrap()).await;
    let model = job["fine_tuned_model"].as_str().unwrap_or_else(|| panic!("{job}"));
    let chat = async |model: &str| {
        let message = json!({"role": "user", "content": "Question 3"});
        let body = json!({"model": model, "messages": [message], "max_tokens": 6, "temperature": 0, "logprobs": true});
        client.post("/v1/chat/completions", &body).await.ok()["choices"][0]["logprobs"].clone()
    };
    // In one batch with the base, and alone.
    let (tuned, base) = tokio::join!(chat(model), chat(BASE));
    assert_ne!(tuned, base);
    assert_eq!((chat(model).await, chat(BASE).await), (tuned.clone(), base));

    let path = format!("/v1/adapters/{model}/download");
    let packed = client.request(Method::GET, &path).send().await.unwrap().error_for_status().unwrap();
    let packed = packed.bytes().await.unwrap().to_vec();
    let import = async |base: &str| {
        let part = multipart::Part::bytes(packed.clone()).file_name("adapter.zip");
        let form = multipart::Form::new().text("model", base.to_owned()).part("file", part);
        answer(client.request(Method::POST, "/v1/adapters").multipart(form)).await
    };
    let imported = import(BASE).await.ok();
    assert_eq!(imported["type"], "full");
    assert_eq!(chat(imported["model"].as_str().unwrap()).await, tuned);
    import("few").await.error(400, "spec_unsupported", Some("file"));
    // Its change is no low-rank one.
    client.get(&format!("{path}?as=lora")).await.error(400, "unsupported", Some("as"));
}
