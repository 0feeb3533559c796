//! Preferences through the running server: upload, report, job, events, and the tuned model's answer.

use serde_json::{Value, json};

use crate::support::{
    server::{BASE, Client, Server, chat_rows},
    tiny::Tiny,
};

const JOBS: &str = "/v1/fine_tuning/jobs";

fn pairs(n: usize) -> String {
    let side = |text: String| json!([{"role": "assistant", "content": text}]);
    let row = |i: usize| {
        json!({"input": {"messages": [{"role": "user", "content": format!("Question {i}")}]},
               "preferred_output": side(format!("Good {i}")),
               "non_preferred_output": side(format!("A bad answer {i}"))})
    };
    (0..n).map(|i| format!("{}\n", row(i))).collect()
}

fn thumbs(n: usize) -> String {
    let row = |i: usize| json!({"prompt": format!("Question {i}"), "completion": format!(" it {i}"), "label": i.is_multiple_of(2)});
    (0..n).map(|i| format!("{}\n", row(i))).collect()
}

async fn file(client: &Client, rows: String) -> String {
    client.upload(rows).await.ok()["id"].as_str().unwrap().to_owned()
}

fn job(file: &str, name: &str, knobs: Value) -> Value {
    json!({"model": BASE, "training_file": file, "suffix": "liked",
           "method": {"type": name, name: {"hyperparameters": knobs}},
           "adapter": {"type": "lora", "r": 4, "alpha": 12}, "training": {"learning_rate": 0.01}})
}

/// The metrics events of a job, oldest first.
fn metrics(events: &[(String, Value)]) -> Vec<Value> {
    let metrics = events.iter().filter(|(_, event)| event["type"] == "metrics");
    metrics.map(|(_, event)| event["data"].clone()).collect()
}

async fn follow(client: &Client, body: &Value, figures: &[&str]) -> Value {
    let queued = client.post(JOBS, body).await.ok();
    let id = queued["id"].as_str().unwrap();
    let events = client.events(id, None).await;
    let ended = client.get(&format!("{JOBS}/{id}")).await.ok();
    assert_eq!(ended["status"], "succeeded", "{ended}");
    let metrics = metrics(&events);
    assert_eq!(metrics.len(), 6, "{metrics:?}");
    for figure in figures {
        assert!(metrics.iter().all(|event| event[*figure].is_f64()), "{figure}: {metrics:?}");
    }
    let loss = |event: &Value| event["train_loss"].as_f64().unwrap();
    assert!(loss(&metrics[5]) < loss(&metrics[0]), "{metrics:?}");
    if body["method"]["type"] == "reward_model" {
        return ended;
    }
    let chat = json!({"model": ended["fine_tuned_model"], "max_tokens": 5,
                      "messages": [{"role": "user", "content": "Question 1"}]});
    assert_eq!(client.post("/v1/chat/completions", &chat).await.ok()["object"], "chat.completion");
    ended
}

#[tokio::test]
async fn dpo_from_upload_to_answer() {
    let server = Server::start();
    let client = server.client();
    let file = file(&client, pairs(6)).await;
    let report = client.get(&format!("/v1/files/{file}/report?model={BASE}")).await.ok();
    assert_eq!((&report["format"], &report["usable_rows"]), (&json!("preference"), &json!(6)));
    let body = job(&file, "dpo", json!({"beta": 0.2, "batch_size": 2, "n_epochs": 2, "loss_type": "sigmoid"}));
    let figures = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"];
    let ended = follow(&client, &body, &figures).await;
    let knobs = &ended["method"]["dpo"]["hyperparameters"];
    assert_eq!(ended["method"]["type"], "dpo");
    assert_eq!((&knobs["beta"], &knobs["batch_size"], &knobs["n_epochs"]), (&json!(0.2), &json!(2), &json!(2)));
    assert_eq!((&knobs["loss_type"], &knobs["label_smoothing"]), (&json!("sigmoid"), &json!(0.0)));
}

#[tokio::test]
async fn kto_from_upload_to_answer() {
    let server = Server::start();
    let client = server.client();
    let file = file(&client, thumbs(6)).await;
    let report = client.get(&format!("/v1/files/{file}/report?model={BASE}")).await.ok();
    assert_eq!(report["format"], "unpaired_preference");
    let body = job(&file, "kto", json!({"desirable_weight": 1.2, "n_epochs": 2}));
    let ended = follow(&client, &body, &["kl", "rewards/accuracies"]).await;
    // `auto` is never a batch that kto cannot compare in.
    assert_eq!(ended["method"]["kto"]["hyperparameters"]["batch_size"], 2);
}

#[tokio::test]
async fn a_reward_model_from_upload_to_score() {
    let server = Server::start();
    let client = server.client();
    let file = file(&client, pairs(6)).await;
    let body = job(&file, "reward_model", json!({"n_epochs": 2, "batch_size": 2, "center_rewards_coefficient": 0.01}));
    let ended = follow(&client, &body, &["rewards/accuracies", "rewards/margins"]).await;
    let model = &ended["fine_tuned_model"];
    let text = |answer: &str| json!({"messages": [{"role": "user", "content": "Question 1"}, {"role": "assistant", "content": answer}]});
    let ask = json!({"model": model, "input": [text("Good 1"), text("A bad answer 1"), text("Good 1")]});
    let found = client.post("/v1/classify", &ask).await.ok();
    let score = |i: usize| found["data"][i]["score"].as_f64().unwrap();
    assert!(score(0) > score(1), "{found}");
    assert_eq!((score(0), &found["data"][2]["index"]), (score(2), &json!(2)));
    let one = client.post("/v1/classify", &json!({"model": model, "input": text("Good 1")})).await.ok();
    assert_eq!(one["data"][0]["score"], found["data"][0]["score"]);
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    // A byte is a token: the bad answer is eight longer.
    assert_eq!(tokens(&found), 3 * tokens(&one) + 8);

    // A scorer does not write, and a writer does not score.
    let chat = json!({"model": model, "messages": [{"role": "user", "content": "hi"}]});
    client.post("/v1/chat/completions", &chat).await.error(400, "wrong_task", Some("model"));
    let on = json!({"model": model, "training_file": file, "method": {"type": "dpo"}});
    client.post(JOBS, &on).await.error(400, "adapter_scores", Some("model"));
    let writer = client.trained(&client.file(4).await).await["fine_tuned_model"].clone();
    for (model, code) in [(&json!(BASE), "wrong_task"), (&writer, "wrong_task")] {
        client.post("/v1/classify", &json!({"model": model, "input": text("a")})).await.error(400, code, Some("model"));
    }
    let wrong = [
        (json!([]), "out_of_range", "input"),
        (json!([text("a"), 3]), "not_an_object", "input.1"),
        (json!({"messages": [{"role": "user", "content": "a"}]}), "invalid_input", "input.0"),
        (json!({"prompt": "a", "chosen": "b", "rejected": "c"}), "invalid_input", "input.0"),
        (text(&"long ".repeat(600)), "context_length_exceeded", "input.0"),
    ];
    for (input, code, param) in wrong {
        client.post("/v1/classify", &json!({"model": model, "input": input})).await.error(400, code, Some(param));
    }
}

#[tokio::test]
async fn what_does_not_fit_is_named() {
    let server = Server::start();
    let client = server.client();
    let (pairs, thumbs) = (file(&client, pairs(4)).await, file(&client, thumbs(4)).await);
    let chats = file(&client, chat_rows(4)).await;
    for (name, file, part) in [
        ("dpo", &chats, "format chat; dpo reads pairs"),
        ("orpo", &thumbs, "format unpaired_preference; orpo reads pairs"),
        ("kto", &pairs, "format preference; kto reads judged answers"),
        ("supervised", &pairs, "format preference; supervised reads rows to learn"),
    ] {
        let answer = client.post(JOBS, &job(file, name, json!({}))).await;
        let message = answer.error(400, "dataset_wrong_format", Some("training_file"));
        assert!(message.contains(part), "{message}");
    }
    let cases = [
        ("dpo", json!({"beta": 0}), "spec_out_of_range", "beta", "above 0"),
        ("dpo", json!({"beta": "much"}), "spec_invalid_type", "beta", "beta"),
        ("dpo", json!({"gamma": 1}), "spec_unknown_field", "gamma", "known are batch_size, beta"),
        ("dpo", json!({"loss_type": "apo"}), "spec_invalid_type", "loss_type", "sigmoid_norm"),
        ("dpo", json!({"label_smoothing": 0.1}), "spec_out_of_range", "label_smoothing", "robust"),
        ("dpo", json!({"loss_type": "robust", "label_smoothing": 0.5}), "spec_out_of_range", "label_smoothing", "0.5"),
        ("dpo", json!({"n_epochs": 0}), "spec_out_of_range", "n_epochs", "1 to 1000"),
        ("ipo", json!({"beta": -1}), "spec_out_of_range", "beta", "above 0"),
        ("kto", json!({"undesirable_weight": 0}), "spec_out_of_range", "undesirable_weight", "above 0"),
        ("kto", json!({"batch_size": 1}), "spec_out_of_range", "batch_size", "at least 2"),
        ("orpo", json!({"beta": 2000}), "spec_out_of_range", "beta", "1000"),
        ("simpo", json!({"gamma": -0.5}), "spec_out_of_range", "gamma", "0 to 1000"),
        (
            "reward_model",
            json!({"center_rewards_coefficient": -1}),
            "spec_out_of_range",
            "center_rewards_coefficient",
            "0 to",
        ),
    ];
    for (name, knobs, code, field, part) in cases {
        let param = format!("method.{name}.hyperparameters.{field}");
        let file = if name == "kto" { &thumbs } else { &pairs };
        let message = client.post(JOBS, &job(file, name, knobs.clone())).await.error(400, code, Some(&param));
        assert!(message.contains(part), "{name} {knobs}: {message}");
    }
    let refused = client.upload(r#"{"prompt":"a","chosen":"b","rejected":"b"}"#).await.ok();
    assert_eq!(refused["status"], "error");
    assert!(refused["status_details"].as_str().unwrap().contains("line 1: `chosen` and `rejected` are the same"));
}

#[tokio::test]
async fn objectives_are_listed_with_their_knobs() {
    let server = Server::start();
    let all = server.client().get("/v1/methods").await.ok();
    let objective = |id: &str| {
        let found = all["data"].as_array().unwrap().iter().find(|card| card["id"] == id);
        found.unwrap_or_else(|| panic!("{id} is not listed")).clone()
    };
    for id in ["supervised", "dpo", "ipo", "kto", "orpo", "simpo", "reward_model", "grpo", "rloo"] {
        assert_eq!(objective(id)["object"], "objective");
    }
    assert_eq!(objective("simpo")["defaults"]["gamma"], 1.0);
    assert_eq!(objective("dpo")["defaults"]["batch_size"], "auto");
}

#[tokio::test]
async fn graders_can_be_tried() {
    let server = Server::start();
    let client = server.client();
    let grader = json!({"type": "multi", "name": "m", "calculate_output": "2 * a", "graders": {
        "a": {"type": "string_check", "name": "a", "input": "{{sample.output_text}}", "reference": "{{item.want}}",
              "operation": "ilike"}}});
    let (run, validate) = ("/v1/fine_tuning/alpha/graders/run", "/v1/fine_tuning/alpha/graders/validate");
    let ask = json!({"grader": grader, "item": {"want": "YES"}, "model_sample": "oh yes"});
    let found = client.post(run, &ask).await.ok();
    assert_eq!((&found["reward"], &found["sub_rewards"]["a"]), (&json!(2.0), &json!(1.0)));
    assert_eq!((&found["metadata"]["name"], &found["metadata"]["type"]), (&json!("m"), &json!("multi")));
    let without = client.post(run, &json!({"grader": grader, "model_sample": "yes"})).await.ok();
    assert_eq!(
        (&without["reward"], &without["metadata"]["errors"]["invalid_variable_error"]),
        (&json!(0.0), &json!(true))
    );
    assert_eq!(client.post(validate, &json!({"grader": grader})).await.ok()["grader"], grader);
    let mut wrong = grader.clone();
    wrong["calculate_output"] = json!("2 *");
    for path in [run, validate] {
        let mut body = json!({"grader": wrong});
        if path == run {
            body["model_sample"] = json!("");
        }
        client.post(path, &body).await.error(400, "spec_invalid_grader", Some("grader"));
    }
    let python = json!({"grader": {"type": "python", "name": "p", "source": ""}});
    client.post(validate, &python).await.error(400, "spec_invalid_grader", Some("grader"));
}

#[tokio::test]
async fn grpo_from_upload_to_answer() {
    let server = Server::start();
    let client = server.client();
    let row = |i: usize| json!({"messages": [{"role": "user", "content": format!("Question {i}")}], "wanted": "a"});
    let rows: String = (0..3).map(|i| format!("{}\n", row(i))).collect();
    let file = file(&client, rows).await;
    let report = client.get(&format!("/v1/files/{file}/report?model={BASE}")).await.ok();
    assert_eq!(report["format"], "reinforcement");
    let grader = json!({"type": "multi", "name": "both", "calculate_output": "short + 0.5 * has", "graders": {
        "short": {"type": "length", "name": "short", "input": "{{sample.output_text}}", "least": 0, "most": 4},
        "has": {"type": "string_check", "name": "has", "input": "{{sample.output_text}}", "operation": "like",
                "reference": "{{item.wanted}}"}}});
    let mut body = job(
        &file,
        "reinforcement",
        json!({"num_generations": 3, "max_completion_length": 6, "n_epochs": 2,
                                                      "batch_size": 1}),
    );
    body["method"]["reinforcement"]["grader"] = grader.clone();
    let queued = client.post(JOBS, &body).await.ok();
    let id = queued["id"].as_str().unwrap();
    let events = client.events(id, None).await;
    let ended = client.get(&format!("{JOBS}/{id}")).await.ok();
    assert_eq!(ended["status"], "succeeded", "{ended}");
    let metrics = metrics(&events);
    assert_eq!(metrics.len(), 6);
    for figure in ["reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "ratio"] {
        assert!(metrics.iter().all(|event| event[figure].is_f64()), "{figure}: {metrics:?}");
    }
    let method = &ended["method"]["reinforcement"];
    assert_eq!((&method["grader"], &method["hyperparameters"]["num_generations"]), (&grader, &json!(3)));
    let chat =
        json!({"model": ended["fine_tuned_model"], "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]});
    assert_eq!(client.post("/v1/chat/completions", &chat).await.ok()["object"], "chat.completion");

    let change = |path: &[&str], value: Value| {
        let mut body = body.clone();
        let (last, before) = path.split_last().unwrap();
        let place = before.iter().fold(&mut body, |at, key| &mut at[*key]);
        place[*last] = value;
        body
    };
    let own = ["method", "reinforcement"];
    for (body, code, param) in [
        (change(&["validation_file"], json!(file)), "unsupported_parameter", "validation_file"),
        (change(&["training", "validation_split"], json!(0.1)), "spec_out_of_range", "training.validation_split"),
        (
            change(&["training", "max_seq_len"], json!(6)),
            "spec_out_of_range",
            "method.reinforcement.hyperparameters.max_completion_length",
        ),
        (
            change(&[own[0], own[1], "grader", "calculate_output"], json!("short + far")),
            "spec_invalid_grader",
            "method.reinforcement.grader",
        ),
        (change(&[own[0], own[1], "grader"], Value::Null), "spec_missing", "method.reinforcement.grader"),
    ] {
        client.post(JOBS, &body).await.error(400, code, Some(param));
    }
    // A field that no row has is found when the first completion is graded: the job says so.
    let absent = change(&[own[0], own[1], "grader", "graders", "has", "reference"], json!("{{item.nowhere}}"));
    let queued = client.post(JOBS, &absent).await.ok();
    let failed = client.end_of(queued["id"].as_str().unwrap()).await;
    assert_eq!((&failed["status"], &failed["error"]["code"]), (&json!("failed"), &json!("spec_invalid_grader")));
    assert!(failed["error"]["message"].as_str().unwrap().contains("item.nowhere"), "{failed}");
}

/// With a steered weight and several inner epochs; a limit on the divergence ends the job, and it succeeds.
#[tokio::test]
async fn ppo_from_upload_to_answer() {
    let server = Server::start();
    let client = server.client();
    let row = |i: usize| json!({"messages": [{"role": "user", "content": format!("Question {i}")}]});
    let rows: String = (0..4).map(|i| format!("{}\n", row(i))).collect();
    let file = file(&client, rows).await;
    let grader = json!({"type": "length", "name": "short", "input": "{{sample.output_text}}", "least": 0, "most": 4});
    let body = |knobs: Value| {
        let mut body = job(&file, "ppo", knobs);
        body["method"]["ppo"]["grader"] = grader.clone();
        body["training"] = json!({"learning_rate": 0.02, "max_seq_len": 128});
        body
    };
    let knobs = json!({"max_completion_length": 6, "num_ppo_epochs": 2, "n_epochs": 3, "batch_size": 2,
                       "kl_target": 1, "kl_horizon": 10});
    let queued = client.post(JOBS, &body(knobs)).await.ok();
    let id = queued["id"].as_str().unwrap();
    let events = metrics(&client.events(id, None).await);
    let ended = client.get(&format!("{JOBS}/{id}")).await.ok();
    assert_eq!((&ended["status"], events.len()), (&json!("succeeded"), 6), "{ended}");
    for figure in [
        "reward",
        "objective/kl",
        "objective/kl_coef",
        "objective/rlhf_reward",
        "entropy",
        "clip_ratio",
        "ratio/first",
        "loss/value_avg",
        "val/clipfrac_avg",
        "completions/mean_length",
    ] {
        assert!(events.iter().all(|event| event[figure].is_f64()), "{figure}: {events:?}");
    }
    assert_eq!(ended["method"]["ppo"]["hyperparameters"]["lam"], 0.95);
    let chat =
        json!({"model": ended["fine_tuned_model"], "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]});
    assert_eq!(client.post("/v1/chat/completions", &chat).await.ok()["object"], "chat.completion");

    let knobs = json!({"max_completion_length": 6, "n_epochs": 50, "batch_size": 4, "max_kl": 0.01});
    let queued = client.post(JOBS, &body(knobs)).await.ok();
    let id = queued["id"].as_str().unwrap();
    let events = client.events(id, None).await;
    let ended = client.get(&format!("{JOBS}/{id}")).await.ok();
    assert_eq!(ended["status"], "succeeded", "{ended}");
    assert!(metrics(&events).len() < 50);
    let said = |(_, event): &(String, Value)| {
        event["message"].as_str().is_some_and(|text| text.contains("above max_kl, 0.01"))
    };
    assert!(events.iter().any(said), "{events:?}");
    for (knobs, field) in [(json!({"kl_horizon": 0}), "kl_horizon"), (json!({"epsilon": 0.1}), "epsilon")] {
        let error = client.post(JOBS, &body(knobs)).await;
        let code = if field == "epsilon" { "spec_unknown_field" } else { "spec_out_of_range" };
        error.error(400, code, Some(&format!("method.ppo.hyperparameters.{field}")));
    }
}

/// What a job made judges another's completions, as it judges texts that are sent to it; on its own base only.
#[tokio::test]
async fn a_reward_model_rewards() {
    let other = tempfile::tempdir().unwrap();
    Tiny { seed: 9, ..Tiny::default() }.write(other.path());
    let server = Server::with(&["--model", &format!("other={}", other.path().display())]);
    let client = server.client();
    let made = job(&file(&client, pairs(6)).await, "reward_model", json!({"n_epochs": 2, "batch_size": 2}));
    let judge = follow(&client, &made, &["rewards/margins"]).await["fine_tuned_model"].clone();
    let grader = json!({"type": "reward_model", "name": "rm", "model": judge});
    let item = json!({"messages": [{"role": "user", "content": "Question 1"}]});
    let run = json!({"grader": grader, "item": item, "model_sample": "Good 1"});
    let graded = client.post("/v1/fine_tuning/alpha/graders/run", &run).await.ok();
    let text =
        json!({"messages": [{"role": "user", "content": "Question 1"}, {"role": "assistant", "content": "Good 1"}]});
    let scored = client.post("/v1/classify", &json!({"model": judge, "input": text})).await.ok();
    let number = |value: &Value| value.as_f64().unwrap() as f32;
    assert_eq!(number(&graded["reward"]), number(&scored["data"][0]["score"]), "{graded} {scored}");

    let rows: String = (0..4).map(|_| format!("{item}\n")).collect();
    let questions = file(&client, rows).await;
    // A weighted sum with a rule.
    let both = json!({"type": "multi", "name": "both", "calculate_output": "rm / 2 + short", "graders": {"rm": grader,
        "short": {"type": "length", "name": "s", "input": "{{sample.output_text}}", "least": 0, "most": 9}}});
    let with = |model: &str, grader: &Value| {
        let knobs = json!({"max_completion_length": 6, "n_epochs": 3, "batch_size": 2, "num_ppo_epochs": 1});
        let mut body = job(&questions, "ppo", knobs);
        (body["method"]["ppo"]["grader"], body["model"]) = (grader.clone(), json!(model));
        body
    };
    follow(&client, &with(BASE, &both), &["reward", "objective/rlhf_reward"]).await;
    // What a formula gives that is no number is left out and counted, up to a share.
    let mut none = both.clone();
    none["calculate_output"] = json!("log(0 - short)");
    let queued = client.post(JOBS, &with(BASE, &none)).await.ok();
    let failed = client.end_of(queued["id"].as_str().unwrap()).await;
    assert_eq!(failed["error"]["code"], "grader_failed", "{failed}");
    assert!(failed["error"]["message"].as_str().unwrap().contains("the formula gives"), "{failed}");

    let inner = Some("method.ppo.grader.graders.rm.model");
    let refused = client.post(JOBS, &with("other", &both)).await.error(400, "wrong_base", inner);
    assert!(refused.contains(BASE) && refused.contains("other"), "{refused}");
    let naming = |model: &Value| json!({"type": "reward_model", "name": "rm", "model": model});
    let param = Some("method.ppo.grader.model");
    client.post(JOBS, &with(BASE, &naming(&json!(BASE)))).await.error(400, "wrong_task", param);
    client.post(JOBS, &with(BASE, &naming(&json!("nobody")))).await.error(404, "model_not_found", param);
}
