//! AdaLoRA through the wire: its schedule at POST, and its result as plain LoRA.

use reqwest::{Method, multipart};
use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server, answer};

const JOBS: &str = "/v1/fine_tuning/jobs";

async fn trained(client: &Client, file: &str, adapter: Value) -> Value {
    let training = json!({"n_epochs": 5, "batch_size": 4, "learning_rate": 0.01});
    let body = json!({"model": BASE, "training_file": file, "adapter": adapter, "training": training});
    let job = client.post(JOBS, &body).await.ok();
    client.end_of(job["id"].as_str().unwrap()).await
}

#[tokio::test]
async fn an_adapter_is_downloaded_as_lora() {
    let server = Server::start();
    let client = server.client();
    let file = client.file(7).await;
    let adapter = json!({"type": "adalora", "init_r": 4, "target_r": 2, "alpha": 9});
    let job = trained(&client, &file, adapter.clone()).await;
    let model = job["fine_tuned_model"].as_str().unwrap_or_else(|| panic!("{job}"));
    // Two steps an epoch; the job says when it prunes.
    assert_eq!((&job["adapter"]["tinit"], &job["adapter"]["tfinal"]), (&json!(1), &json!(3)));
    let packed = async |query: &str| {
        let path = format!("/v1/adapters/{model}/download{query}");
        client.request(Method::GET, &path).send().await.unwrap().error_for_status().unwrap().bytes().await.unwrap()
    };
    let import = async |packed: &[u8]| {
        let part = multipart::Part::bytes(packed.to_vec()).file_name("adapter");
        let form = multipart::Form::new().text("model", BASE).part("file", part);
        answer(client.request(Method::POST, "/v1/adapters").multipart(form)).await.ok()
    };
    let (own, lora) = (import(&packed("").await).await, import(&packed("?as=lora&format=tar").await).await);
    assert_eq!((&own["type"], &lora["type"]), (&json!("adalora"), &json!("lora")));
    let chat = async |model: &str| {
        let message = json!({"role": "user", "content": "Question 3"});
        let body = json!({"model": model, "messages": [message], "max_tokens": 6, "temperature": 0, "logprobs": true});
        client.post("/v1/chat/completions", &body).await.ok()["choices"][0].clone()
    };
    let (base, tuned) = (chat(BASE).await, chat(model).await);
    assert_eq!(chat(own["model"].as_str().unwrap()).await, tuned);
    let folded = chat(lora["model"].as_str().unwrap()).await;
    let first = |choice: &Value| choice["logprobs"]["content"][0]["logprob"].as_f64().unwrap();
    assert_eq!(folded["message"], tuned["message"]);
    assert!((first(&folded) - first(&tuned)).abs() < 1e-4, "{folded} {tuned}");
    assert!((first(&base) - first(&tuned)).abs() > 1e-3, "{base} {tuned}");

    let path = format!("/v1/adapters/{model}/download");
    client.get(&format!("{path}?as=dora")).await.error(400, "out_of_range", Some("as"));
    let other = trained(&client, &file, json!({"type": "ia3"})).await;
    assert_eq!(other["adapter"]["target_modules"], json!(["k_proj", "v_proj", "down_proj"]));
    let path = format!("/v1/adapters/{}/download", other["fine_tuned_model"].as_str().unwrap());
    client.get(&format!("{path}?as=lora")).await.error(400, "unsupported", Some("as"));

    // A schedule that does not fit the run's steps, counted without the rows held out.
    let body = |adapter: Value, training: Value| json!({"model": BASE, "training_file": file, "adapter": adapter, "training": training});
    let long = json!({"type": "adalora", "tinit": 6, "tfinal": 4});
    let ten = json!({"n_epochs": 5, "batch_size": 4});
    let message =
        client.post(JOBS, &body(long.clone(), ten)).await.error(400, "spec_out_of_range", Some("adapter.tfinal"));
    assert!(message.ends_with("leave none of the run's 10"), "{message}");
    let split = json!({"n_epochs": 11, "batch_size": 4, "validation_split": 0.5});
    let mut dry = body(long, split);
    dry["dry_run"] = json!(true);
    assert_eq!(client.post(JOBS, &dry).await.ok()["adapter"]["tinit"], 6);
    dry["training"]["n_epochs"] = json!(10);
    client.post(JOBS, &dry).await.error(400, "spec_out_of_range", Some("adapter.tfinal"));
}
