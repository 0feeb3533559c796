//! What a GPU runs, on the CPU: candle's own operations in the place of our kernels (`--cpu-kernels candle`) train and
//! serve every method to the same numbers. And what `--device` says where there is no GPU.

use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server};

/// A method with everything that it puts between the base's operations, and an objective.
fn jobs() -> Vec<(Value, Value)> {
    let supervised = || json!({"type": "supervised"});
    vec![
        (json!({"type": "lora", "r": 3, "alpha": 7, "dropout": 0.2}), supervised()),
        (
            json!({"type": "lora", "r": 2, "alpha": 5, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
            supervised(),
        ),
        (json!({"type": "lora", "r": 2, "alpha": 5, "modules_to_save": ["model.norm", "lm_head"]}), supervised()),
        (
            json!({"type": "dora", "r": 3, "alpha": 7, "dropout": 0.1, "trainable_token_indices": [33, 64]}),
            supervised(),
        ),
        (json!({"type": "adalora", "init_r": 3, "target_r": 1, "alpha": 9, "orth_reg_weight": 0.1}), supervised()),
        (json!({"type": "ia3"}), supervised()),
        (json!({"type": "prompt_tuning", "num_virtual_tokens": 5}), supervised()),
        (json!({"type": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 12}), supervised()),
        (json!({"type": "prefix_tuning", "num_virtual_tokens": 5, "prefix_projection": true}), supervised()),
        (json!({"type": "unipelt", "lora_r": 3, "prefix_length": 4, "bottleneck_size": 12}), supervised()),
        (json!({"type": "moe_lora", "num_experts": 3, "r": 2, "alpha": 5, "jitter_noise": 0.02}), supervised()),
        (
            json!({"type": "moe_lora", "variant": "adamole", "num_experts": 3, "r": 2, "alpha": 5,
                   "target_modules": ["k_proj", "o_proj"]}),
            supervised(),
        ),
        (
            json!({"type": "moe_lora", "variant": "loramoe", "num_experts": 3, "r": 2, "alpha": 5, "blc_weight": 0.1}),
            supervised(),
        ),
        (json!({"type": "lora", "r": 3, "alpha": 7}), json!({"type": "dpo"})),
    ]
}

/// Rows of uneven lengths, as the objective takes them.
fn rows(objective: &Value) -> String {
    let row = |i: usize| {
        let question = json!([{"role": "user", "content": format!("Question {i}{}", " and more".repeat(i % 3))}]);
        let side = |text: String| json!([{"role": "assistant", "content": text}]);
        match objective["type"] == "dpo" {
            true => json!({"input": {"messages": question}, "preferred_output": side(format!("Answer {i}")),
                           "non_preferred_output": side("No.".repeat(1 + i % 2))}),
            false => json!({"messages": [question[0], side(format!("Answer {i}"))[0]]}),
        }
    };
    (0..6).map(|i| format!("{}\n", row(i))).collect()
}

/// The losses and gradient norms of a short job, and the log-probabilities that the trained model answers with.
async fn figures(client: &Client, adapter: &Value, objective: &Value) -> Vec<f64> {
    let file = client.upload(rows(objective)).await.ok()["id"].clone();
    let training = json!({"max_steps": 4, "learning_rate": 0.01, "batch_size": 3, "precision": "f32",
                          "gradient_checkpointing": adapter["dropout"].is_number()});
    let body = json!({"model": BASE, "training_file": file, "adapter": adapter, "method": objective, "seed": 5,
                      "training": training});
    let job = client.post("/v1/fine_tuning/jobs", &body).await.ok();
    let events = client.events(job["id"].as_str().unwrap(), None).await;
    let steps = events.iter().filter(|(_, event)| event["type"] == "metrics").map(|(_, event)| &event["data"]);
    let mut found: Vec<f64> = steps
        .filter_map(|data| data["grad_norm"].as_f64())
        .chain(events.iter().filter_map(|(_, event)| event["data"]["train_loss"].as_f64()))
        .collect();
    assert_eq!(found.len(), 8, "{adapter}: {events:?}");
    let model = client.get(&format!("/v1/fine_tuning/jobs/{}", job["id"].as_str().unwrap())).await.ok();
    let request = json!({"model": model["fine_tuned_model"], "prompt": "Question 7", "max_tokens": 5, "temperature": 0,
                         "logprobs": 1});
    let answer = client.post("/v1/completions", &request).await.ok();
    let logprobs = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    assert!(!logprobs.is_empty());
    found.extend(logprobs.iter().map(|x| x.as_f64().unwrap()));
    found
}

#[tokio::test]
async fn composed_operations_train_and_serve_every_method_alike() {
    let (ours, composed) = (Server::with(&["--exact"]), Server::with(&["--exact", "--cpu-kernels", "candle"]));
    for (adapter, objective) in jobs() {
        let expected = figures(&ours.client(), &adapter, &objective).await;
        let found = figures(&composed.client(), &adapter, &objective).await;
        assert_eq!(expected.len(), found.len(), "{adapter}");
        for (expected, found) in expected.iter().zip(&found) {
            assert!((expected - found).abs() < 1e-3 * (1.0 + expected.abs()), "{adapter}: {found} is not {expected}");
        }
        // Other operations round otherwise: equal bits would mean that the same code has run.
        assert_ne!(expected, found, "{adapter}");
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_is_not_there_ends_the_start() {
    let server = Server::start();
    for (device, message) in [("cuda", "built without CUDA"), ("gpu", "neither cpu nor cuda")] {
        let (model, dir) = (server.model_argument(), tempfile::tempdir().unwrap());
        let serve = ["serve", "--listen", "127.0.0.1:0", "--data-dir", dir.path().to_str().unwrap(), "--model", &model];
        let error = server.command(&[&serve[..], &["--device", device]].concat()).unwrap_err();
        assert!(error.contains("--device") && error.contains(message), "{error}");
    }
}
