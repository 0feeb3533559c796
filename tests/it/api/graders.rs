//! Graders that ask: models here, an OpenAI-compatible server, a service.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::support::{
    elsewhere::{Asked, Elsewhere},
    server::{BASE, Client, Server},
};

const JOBS: &str = "/v1/fine_tuning/jobs";
const RUN: &str = "/v1/fine_tuning/alpha/graders/run";
const VALIDATE: &str = "/v1/fine_tuning/alpha/graders/validate";

fn score_model(more: Value) -> Value {
    let mut grader = json!({"type": "score_model", "name": "judge", "model": BASE, "input": [
        {"role": "user", "content": "Rate {{item.topic}}: {{sample.output_text}}"}]});
    grader.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    grader
}

async fn run(client: &Client, grader: &Value, sample: &str) -> Value {
    client.post(RUN, &json!({"grader": grader, "item": {"topic": "tea"}, "model_sample": sample})).await.ok()
}

/// An OpenAI-compatible server's answer.
fn chat(text: &str) -> Response {
    let choice = json!({"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"});
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9});
    Json(json!({"object": "chat.completion", "choices": [choice], "usage": usage})).into_response()
}

/// `P(text | prompt)` by the log-probabilities that completions echo.
async fn likelihood(client: &Client, prompt: &str, text: &str) -> f64 {
    let body =
        json!({"model": BASE, "prompt": format!("{prompt}{text}"), "max_tokens": 0, "echo": true, "logprobs": 1});
    let choice = client.post("/v1/completions", &body).await.ok()["choices"][0].clone();
    let all = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    // The tiny base has one token a byte.
    all[all.len() - text.len()..].iter().map(|p| p.as_f64().unwrap()).sum::<f64>().exp()
}

#[tokio::test]
async fn a_models_expected_score_is_that_of_its_distribution() {
    let server = Server::start();
    let client = server.client();
    let prompt = "<|im_start|>user\nRate tea: hot<|im_end|>\n<|im_start|>assistant\n";
    let mut shares = Vec::new();
    for label in 1..=10 {
        let mut share = 0.0;
        for text in [format!("{label}"), format!(" {label}")] {
            share += likelihood(&client, prompt, &text).await;
            // What begins with 1 and goes on to 10 is a 10.
            if label == 1 {
                share -= likelihood(&client, prompt, &format!("{text}0")).await;
            }
        }
        shares.push(share);
    }
    let mean = (1..=10).zip(&shares).map(|(i, p)| f64::from(i) * p).sum::<f64>() / shares.iter().sum::<f64>();
    let found = run(&client, &score_model(json!({"scoring": "expected", "range": [1, 10]})), "hot").await;
    let reward = found["reward"].as_f64().unwrap();
    assert!((reward - mean).abs() < 1e-3, "{reward} {mean}");
    // Without a range it lies between −1 and 1; twice the same.
    let found = run(&client, &score_model(json!({"scoring": "expected"})), "hot").await;
    assert!((found["reward"].as_f64().unwrap() - ((mean - 1.0) / 4.5 - 1.0)).abs() < 1e-3, "{found} {mean}");
    let usage = &found["model_grader_token_usage_per_model"][BASE];
    assert!(usage["prompt_tokens"].as_u64().unwrap() >= prompt.len() as u64 - 30, "{found}");
    assert_eq!(found["metadata"]["sampled_model_name"], BASE);
}

#[tokio::test]
async fn nonsense_is_asked_for_again_and_then_said() {
    let server = Server::start();
    let client = server.client();
    for (temperature, attempts) in [(1.0, "3 attempts"), (0.0, "1 attempts")] {
        let params = json!({"sampling_params": {"temperature": temperature, "max_completions_tokens": 4}});
        let found = run(&client, &score_model(params), "hot").await;
        let errors = &found["metadata"]["errors"];
        assert_eq!((&found["reward"], &errors["unresponsive_reward_error"]), (&json!(0.0), &json!(true)), "{found}");
        let details = errors["details"].as_str().unwrap();
        assert!(details.starts_with("judge: it answers") && details.contains(attempts), "{details}");
        let written = found["model_grader_token_usage_per_model"][BASE]["completion_tokens"].as_u64().unwrap();
        assert!((1..=4 * 3).contains(&written), "{found}");
    }
}

#[tokio::test]
async fn others_are_asked_as_openai_is() {
    let site = Elsewhere::start(|n, asked: Asked| async move {
        if asked.body["logprobs"] == true {
            let top = [("1", 0.5f64), ("9", 0.25), (" 9", 0.125), ("x", 0.125)];
            let top: Vec<Value> = top.iter().map(|(t, p)| json!({"token": t, "logprob": p.ln()})).collect();
            let choice = json!({"logprobs": {"content": [{"token": "1", "top_logprobs": top}]}});
            return Json(json!({"choices": [choice]})).into_response();
        }
        chat(if n == 0 { "hm" } else { "Score: 0.75" })
    })
    .await;
    let server = Server::with(&["--outbound-allow", &site.host, "--outbound-key", &format!("{}=s3cret", site.host)]);
    let client = server.client();
    let endpoint = site.url("/v1");
    let parts =
        json!([{"type": "input_text", "text": "Rate "}, {"type": "input_text", "text": "{{sample.output_text}}"}]);
    let grader = score_model(json!({"endpoint": endpoint, "model": "big", "sampling_params": {"seed": 5},
        "input": [{"role": "system", "content": "Be fair."}, {"type": "message", "role": "user", "content": parts}]}));
    let found = run(&client, &grader, "hot").await;
    assert_eq!(found["reward"], 0.75, "{found}");
    assert_eq!(found["model_grader_token_usage_per_model"]["big"]["total_tokens"], 18);
    let asked = site.asked();
    assert_eq!((asked.len(), asked[1].path.as_str()), (2, "/v1/chat/completions"));
    assert_eq!(asked[1].key.as_deref(), Some("Bearer s3cret"));
    let messages = json!([{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Rate hot"}]);
    assert_eq!(
        (&asked[1].body["model"], &asked[1].body["messages"], &asked[1].body["seed"]),
        (&json!("big"), &messages, &json!(5))
    );
    // (1·0.5 + 9·0.375) / 0.875
    let expected = score_model(json!({"endpoint": endpoint, "scoring": "expected", "range": [1, 10]}));
    let reward = run(&client, &expected, "hot").await["reward"].as_f64().unwrap();
    assert!((reward - 3.875 / 0.875).abs() < 1e-9, "{reward}");
}

fn rows(n: usize) -> String {
    let row = |i: usize| json!({"messages": [{"role": "user", "content": format!("Question {i}")}], "topic": format!("t{i}")});
    (0..n).map(|i| format!("{}\n", row(i))).collect()
}

fn job(file: &str, grader: Value, knobs: Value) -> Value {
    let mut hyper = json!({"num_generations": 4, "max_completion_length": 4, "n_epochs": 1, "batch_size": 2});
    hyper.as_object_mut().unwrap().extend(knobs.as_object().unwrap().clone());
    json!({"model": BASE, "training_file": file, "adapter": {"type": "lora", "r": 2, "alpha": 3},
           "method": {"type": "grpo", "grpo": {"grader": grader, "hyperparameters": hyper}}})
}

#[tokio::test]
async fn a_job_learns_from_a_service_that_is_silent_at_times() {
    let site = Elsewhere::start(|_, asked: Asked| async move {
        let text = asked.body["sample"]["output_text"].as_str().unwrap();
        assert!(asked.body["item"]["topic"].as_str().unwrap().starts_with('t'));
        let is_silent = asked.path == "/never" || text.len().is_multiple_of(3);
        match is_silent {
            true => StatusCode::UNPROCESSABLE_ENTITY.into_response(),
            false => Json(json!({"score": text.len()})).into_response(),
        }
    })
    .await;
    let server = Server::with(&["--outbound-allow", &site.host]);
    let client = server.client();
    let file = client.upload(rows(6)).await.ok()["id"].as_str().unwrap().to_owned();
    let service = |path: &str| json!({"type": "endpoint", "name": "s", "url": site.url(path)});
    let twice = json!({"type": "multi", "name": "m", "calculate_output": "2 * s + 0 * v", "graders": {
        "s": service("/some"), "v": {"type": "json_valid", "name": "v", "input": "{{sample.output_text}}"}}});
    let queued = client.post(JOBS, &job(&file, twice, json!({"max_ungraded": 1}))).await.ok();
    assert_eq!(queued["method"]["grpo"]["hyperparameters"]["max_ungraded"], 1.0);
    let id = queued["id"].as_str().unwrap();
    let events = client.events(id, None).await;
    let ended = client.get(&format!("{JOBS}/{id}")).await.ok();
    assert_eq!(ended["status"], "succeeded", "{ended}");
    let metrics: Vec<&Value> =
        events.iter().map(|(_, event)| event).filter(|event| event["type"] == "metrics").collect();
    let missing: f64 = metrics.iter().map(|event| event["data"]["frac_ungraded"].as_f64().unwrap() * 8.0).sum();
    assert_eq!(site.asked().len(), 24);
    let silent = site
        .asked()
        .iter()
        .filter(|one| one.body["sample"]["output_text"].as_str().unwrap().len().is_multiple_of(3))
        .count();
    assert!((missing - silent as f64).abs() < 1e-9 && silent > 0, "{missing} {silent}");
    let said = |event: &Value| event["message"].as_str().unwrap().contains("completions have no reward");
    assert!(events.iter().any(|(_, event)| event["level"] == "warn" && said(event)), "{events:?}");
    // Who never answers fails the job, which says why.
    let queued = client.post(JOBS, &job(&file, service("/never"), json!({}))).await.ok();
    let failed = client.end_of(queued["id"].as_str().unwrap()).await;
    assert_eq!((&failed["status"], &failed["error"]["code"]), (&json!("failed"), &json!("grader_failed")));
    let message = failed["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("8 of 8") && message.contains("422") && message.contains("max_ungraded is 0.5"),
        "{message}"
    );
}

/// The base judges what is learnt on it, by the probabilities of its scores; nothing is drawn for that.
#[tokio::test]
async fn a_job_learns_from_what_its_own_base_expects() {
    let server = Server::start();
    let client = server.client();
    let file = client.upload(rows(4)).await.ok()["id"].as_str().unwrap().to_owned();
    let judge = score_model(json!({"scoring": "expected"}));
    let queued = client.post(JOBS, &job(&file, judge, json!({"max_ungraded": 1}))).await.ok();
    let id = queued["id"].as_str().unwrap();
    let events = client.events(id, None).await;
    let ended = client.get(&format!("{JOBS}/{id}")).await.ok();
    assert_eq!(ended["status"], "succeeded", "{ended}");
    let metrics: Vec<&Value> =
        events.iter().map(|(_, event)| &event["data"]).filter(|data| data["train_loss"].is_f64()).collect();
    assert_eq!(metrics.len(), 2);
    for step in metrics {
        let (reward, deviation) = (step["reward"].as_f64().unwrap(), step["reward_std"].as_f64().unwrap());
        assert!((-1.0..=1.0).contains(&reward) && deviation > 0.0, "{step}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_judge_is_said_by_field() {
    let server = Server::start();
    let client = server.client();
    let grader = |more: Value| json!({"grader": score_model(more)});
    let text = |content: Value| json!({"input": [{"role": "user", "content": content}]});
    for (more, field) in [
        (json!({"model": ""}), "model"),
        (json!({"input": []}), "input"),
        (text(json!([{"type": "input_image", "image_url": "x"}])), "input.0.content"),
        (text(json!(null)), "input.0.content"),
        (json!({"range": [1, 0]}), "range"),
        (json!({"range": [0, 0]}), "range"),
        (json!({"sampling_params": {"temperature": 2.5}}), "sampling_params.temperature"),
        (json!({"sampling_params": {"top_p": 0}}), "sampling_params.top_p"),
        (json!({"sampling_params": {"max_completions_tokens": 0}}), "sampling_params.max_completions_tokens"),
        (json!({"scoring": "expected", "sampling_params": {"seed": 1}}), "sampling_params"),
    ] {
        let param = format!("grader.{field}");
        client.post(VALIDATE, &grader(more)).await.error(400, "spec_invalid_grader", Some(&param));
    }
    for more in [
        json!({"scoring": "best"}),
        json!({"range": [1]}),
        json!({"sampling_params": {"reasoning_effort": "high"}}),
        json!({"input": [{"role": "tool", "content": "x"}]}),
        json!({"surprise": 1}),
    ] {
        client.post(VALIDATE, &grader(more)).await.error(400, "spec_invalid_grader", Some("grader"));
    }
    let unknown = grader(json!({"model": "ft:nobody"}));
    client.post(VALIDATE, &unknown).await.error(404, "model_not_found", Some("grader.model"));
    for address in ["http://example.com/v1", "https://127.0.0.1/v1", "https://[::1]/", "ftp://example.com", "x"] {
        let refused = grader(json!({"endpoint": address}));
        client.post(VALIDATE, &refused).await.error(400, "address_refused", Some("grader.endpoint"));
        let service = json!({"grader": {"type": "endpoint", "name": "s", "url": address}});
        client.post(VALIDATE, &service).await.error(400, "address_refused", Some("grader.url"));
    }
    // Where it stands is said in jobs too, however deep.
    let file = client.upload(rows(2)).await.ok()["id"].as_str().unwrap().to_owned();
    let deep = json!({"type": "multi", "name": "m", "calculate_output": "a", "graders": {
        "a": score_model(json!({"model": "ft:nobody"}))}});
    let body = job(&file, deep, json!({}));
    client.post(JOBS, &body).await.error(404, "model_not_found", Some("method.grpo.grader.graders.a.model"));
    let knob = job(&file, score_model(json!({})), json!({"max_ungraded": 1.5}));
    let param = "method.grpo.hyperparameters.max_ungraded";
    client.post(JOBS, &knob).await.error(400, "spec_out_of_range", Some(param));
}
