//! Preferences that a judge finds: rules, models here and elsewhere, restarts, and what is wrong by field.

use std::{sync::Arc, time::Duration};

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

const PREFERENCES: &str = "/v1/preferences";

fn question(i: usize) -> Value {
    json!([{"role": "user", "content": format!("Question {i}{}", " and more".repeat(i % 3))}])
}

async fn upload(client: &Client, rows: impl Iterator<Item = Value>) -> String {
    let text: String = rows.map(|row| format!("{row}\n")).collect();
    client.upload(text).await.ok()["id"].as_str().unwrap().to_owned()
}

async fn prompts(client: &Client, n: usize) -> String {
    upload(client, (0..n).map(|i| json!({"messages": question(i), "topic": format!("t{i}")}))).await
}

/// Pairs whose first answer is the longer one where `i` is even.
async fn pairs(client: &Client, n: usize) -> String {
    let answer = |text: String| json!([{"role": "assistant", "content": text}]);
    let row = |i: usize| {
        let (long, short) = (answer(format!("a long answer {i}")), answer(format!("short {i}")));
        let (first, second) = if i.is_multiple_of(2) { (long, short) } else { (short, long) };
        json!({"input": {"messages": question(i)}, "preferred_output": first, "non_preferred_output": second})
    };
    upload(client, (0..n).map(row)).await
}

/// Follows a task to its end.
async fn ended(client: &Client, task: &Value) -> Value {
    let path = format!("{PREFERENCES}/{}", task["id"].as_str().unwrap());
    loop {
        let now = client.get(&path).await.ok();
        if ["succeeded", "failed", "cancelled"].contains(&now["status"].as_str().unwrap()) {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

async fn rows(client: &Client, task: &Value) -> Vec<Value> {
    let file = task["result_file"].as_str().unwrap_or_else(|| panic!("{task}"));
    let response = client.request(reqwest::Method::GET, &format!("/v1/files/{file}/content")).send().await.unwrap();
    response.text().await.unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn near(text: &str) -> Value {
    json!({"type": "text_similarity", "name": "near", "input": "{{sample.output_text}}", "reference": text,
           "evaluation_metric": "fuzzy_match"})
}

/// From prompts to a better adapter: two answers each, the higher score preferred, a dpo job on the file.
#[tokio::test]
async fn answers_are_drawn_and_a_grader_prefers() {
    let server = Server::start();
    let client = server.client();
    let file = prompts(&client, 10).await;
    let grader = near("the quick brown fox");
    let body = json!({"file": file, "model": BASE, "judge": {"type": "grader", "grader": grader},
                      "sampling": {"max_completion_tokens": 12, "seed": 7}, "metadata": {"why": "a test"}});
    let queued = client.post(PREFERENCES, &body).await.ok();
    assert_eq!(
        (&queued["object"], &queued["total"], &queued["metadata"]["why"]),
        (&json!("preferences"), &json!(10), &json!("a test"))
    );
    let task = ended(&client, &queued).await;
    assert_eq!((&task["status"], &task["done"]), (&json!("succeeded"), &json!(10)), "{task}");
    let (report, made) = (&task["report"], rows(&client, &task).await);
    let dropped: u64 = report["dropped"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(made.len() as u64 + dropped, 10, "{report}");
    assert!(made.len() >= 3 && report["rows"] == made.len(), "{report}");
    assert_eq!(report["agreement"], 1.0);
    assert!(report["usage"][BASE]["completion_tokens"].as_u64().unwrap() >= 20, "{report}");
    for row in &made {
        let mut scores = Vec::new();
        for side in ["preferred_output", "non_preferred_output"] {
            let sample = row[side][0]["content"].as_str().unwrap();
            let run = json!({"grader": grader, "model_sample": sample});
            let graded = client.post("/v1/fine_tuning/alpha/graders/run", &run).await.ok();
            scores.push(graded["reward"].as_f64().unwrap());
        }
        assert!(scores[0] > scores[1], "{row}");
        assert_eq!((&row["probability"], &row["judgement"]["orders"]), (&json!(1.0), &json!([1.0, 1.0])));
    }
    // The same seed, the same file.
    let again = ended(&client, &client.post(PREFERENCES, &body).await.ok()).await;
    assert_ne!(again["id"], task["id"]);
    assert_eq!(rows(&client, &again).await, made);
    let listed = client.get(&format!("{PREFERENCES}?limit=1")).await.ok();
    assert_eq!((&listed["data"][0]["id"], &listed["has_more"]), (&again["id"], &json!(true)));
    let job = json!({"model": BASE, "training_file": task["result_file"], "adapter": {"type": "lora", "r": 2, "alpha": 3},
                     "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}}});
    let job = client.post("/v1/fine_tuning/jobs", &job).await.ok();
    assert_eq!(client.end_of(job["id"].as_str().unwrap()).await["status"], "succeeded");
}

/// `P(text | prompt)`; the tiny base has one token a byte.
async fn likelihood(client: &Client, prompt: &str, text: &str) -> f64 {
    let body =
        json!({"model": BASE, "prompt": format!("{prompt}{text}"), "max_tokens": 0, "echo": true, "logprobs": 1});
    let choice = client.post("/v1/completions", &body).await.ok()["choices"][0].clone();
    let all = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    all[all.len() - text.len()..].iter().map(|p| p.as_f64().unwrap()).sum::<f64>().exp()
}

#[tokio::test]
async fn a_model_reads_both_orders() {
    let server = Server::start();
    let client = server.client();
    let file = pairs(&client, 8).await;
    let body = json!({"file": file, "judge": {"type": "model", "model": BASE}, "criteria": ["be kind", "be short"],
                      "max_dropped": 1});
    let task = ended(&client, &client.post(PREFERENCES, &body).await.ok()).await;
    assert_eq!(task["status"], "succeeded", "{task}");
    let made = rows(&client, &task).await;
    // A random model does not always think of 1 or 2.
    let unjudged = task["report"]["dropped"]["unjudged"].as_u64().unwrap_or(0);
    assert!(made.len() >= 3 && made.len() as u64 + unjudged == 8, "{task}");
    let (mut agreed, mut first_shown) = (0.0, 0.0);
    for row in &made {
        let text = |side: &str| row[side][0]["content"].as_str().unwrap().to_owned();
        let (better, worse) = (text("preferred_output"), text("non_preferred_output"));
        let mut orders = Vec::new();
        for [a, b] in [[&better, &worse], [&worse, &better]] {
            let asked = format!(
                "<|im_start|>user\nTwo responses to a conversation follow. Decide which of them is better by these \
                 criteria:\n- be kind\n- be short\n\nConversation:\nuser: {}\n\nResponse 1:\n{a}\n\nResponse 2:\n{b}\n\n\
                 Answer with the number of the better response, 1 or 2, and nothing else.\nPreferred Response=\
                 <|im_end|>\n<|im_start|>assistant\n",
                row["input"]["messages"][0]["content"].as_str().unwrap(),
            );
            let mut p = [0.0; 2];
            for (label, p) in ["1", "2"].iter().zip(&mut p) {
                *p = likelihood(&client, &asked, label).await + likelihood(&client, &asked, &format!(" {label}")).await;
            }
            orders.push(p[0] / (p[0] + p[1]));
        }
        let expected = [orders[0], 1.0 - orders[1]];
        let found: Vec<f64> = serde_json::from_value(row["judgement"]["orders"].clone()).unwrap();
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-3), "{found:?} {expected:?}");
        let probability = row["probability"].as_f64().unwrap();
        assert!(probability > 0.5 && (probability - (found[0] + found[1]) / 2.0).abs() < 1e-12, "{row}");
        assert_eq!(
            (&row["judgement"]["judge"], &row["judgement"]["criteria"]),
            (&json!(BASE), &json!(["be kind", "be short"]))
        );
        assert_eq!(row["judgement"]["prompt_sha256"].as_str().unwrap().len(), 64);
        agreed += f64::from(u8::from((found[0] > 0.5) == (found[1] > 0.5)));
        first_shown += 0.5 + (found[0] - found[1]) / 2.0;
    }
    let report = &task["report"];
    let n = made.len() as f64;
    assert!((report["agreement"].as_f64().unwrap() - agreed / n).abs() < 1e-9);
    // A label's orders are those of the better answer: turned round, what is shown first is as likely.
    assert!((report["first_shown"].as_f64().unwrap() - first_shown / n).abs() < 1e-9, "{report}");
    assert!(report["usage"][BASE]["prompt_tokens"].as_u64().unwrap() > made.len() as u64 * 400, "{report}");
    // A wide margin leaves what a random model says undecided.
    let mut strict = body.clone();
    strict["min_margin"] = json!(0.49);
    let task = ended(&client, &client.post(PREFERENCES, &strict).await.ok()).await;
    assert_eq!((&task["status"], &task["error"]["code"]), (&json!("failed"), &json!("dataset_empty")));
    assert!(task["error"]["message"].as_str().unwrap().contains("undecided"), "{task}");
}

/// What a judge elsewhere is shown: the two responses.
fn shown(asked: &Asked) -> [String; 2] {
    let text = asked.body["messages"][0]["content"].as_str().unwrap();
    let behind = |mark: &str| text.split(mark).nth(1).unwrap().split("\n\n").next().unwrap().trim().to_owned();
    [behind("Response 1:\n"), behind("Response 2:\n")]
}

/// P(1) and P(2), as OpenAI tells them.
fn told(first: f64) -> Response {
    let token = |text: &str, p: f64| json!({"token": text, "logprob": p.ln()});
    let top = json!([token("1", 0.8 * first), token("2", 0.8 * (1.0 - first)), token("x", 0.2)]);
    let usage = json!({"prompt_tokens": 50, "completion_tokens": 1});
    Json(json!({"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}], "usage": usage})).into_response()
}

fn word(text: &str) -> Response {
    Json(json!({"choices": [{"message": {"role": "assistant", "content": text}}]})).into_response()
}

#[tokio::test]
async fn a_bias_to_what_is_shown_first_cancels_out() {
    // Likes the longer one by 0.1, and the first by 0.35.
    let site = Elsewhere::start(|_, asked| async move {
        let [a, b] = shown(&asked);
        told(0.5 + 0.35 + if a.len() > b.len() { 0.1 } else { -0.1 })
    })
    .await;
    let blunt = Elsewhere::start(|_, asked| async move {
        let [a, b] = shown(&asked);
        if asked.body["logprobs"] == true {
            StatusCode::BAD_REQUEST.into_response()
        } else {
            word(if a.len() > b.len() { "1" } else { "2." })
        }
    })
    .await;
    let server = Server::with(&["--outbound-allow", &site.host, "--outbound-allow", &blunt.host]);
    let client = server.client();
    let file = pairs(&client, 6).await;
    let body = |site: &Elsewhere| json!({"file": file, "judge": {"type": "model", "model": "big", "endpoint": site.url("/v1")}});
    let task = ended(&client, &client.post(PREFERENCES, &body(&site)).await.ok()).await;
    assert_eq!(task["status"], "succeeded", "{task}");
    let made = rows(&client, &task).await;
    assert_eq!(made.len(), 6);
    for (i, row) in made.iter().enumerate() {
        let text = row["preferred_output"][0]["content"].as_str().unwrap();
        assert_eq!(text, format!("a long answer {i}"));
        assert!((row["probability"].as_f64().unwrap() - 0.6).abs() < 1e-9, "{row}");
    }
    let report = &task["report"];
    let number = |name: &str| report[name].as_f64().unwrap();
    assert_eq!(number("agreement"), 0.0, "the order decided: {report}");
    assert!((number("first_shown") - 0.85).abs() < 1e-9 && (number("certainty") - 0.6).abs() < 1e-9, "{report}");
    assert_eq!(report["usage"]["big"], json!({"prompt_tokens": 600, "completion_tokens": 12}));
    assert_eq!(site.asked().len(), 12);
    // A server that tells no probabilities is taken at its word.
    let task = ended(&client, &client.post(PREFERENCES, &body(&blunt)).await.ok()).await;
    let made = rows(&client, &task).await;
    let is_long = |row: &Value| row["preferred_output"][0]["content"].as_str().unwrap().starts_with("a long");
    assert!(made.len() == 6 && made.iter().all(|row| is_long(row) && row["probability"] == 1.0), "{made:?}");
}

#[tokio::test]
async fn a_judge_that_fails_at_times_is_counted_and_at_last_fatal() {
    let site = Elsewhere::start(|_, asked| async move {
        let [a, b] = shown(&asked);
        let is_last = a.ends_with('5') || asked.path.starts_with("/never");
        match (is_last, asked.body["logprobs"] == true) {
            (true, _) => word("well"),
            (false, true) => StatusCode::BAD_REQUEST.into_response(),
            (false, false) => word(if a.len() > b.len() { "1" } else { "2" }),
        }
    })
    .await;
    let server = Server::with(&["--outbound-allow", &site.host]);
    let client = server.client();
    let file = pairs(&client, 6).await;
    let body =
        |path: &str| json!({"file": file, "judge": {"type": "model", "model": "big", "endpoint": site.url(path)}});
    let task = ended(&client, &client.post(PREFERENCES, &body("/v1")).await.ok()).await;
    assert_eq!((&task["status"], &task["report"]["dropped"]), (&json!("succeeded"), &json!({"unjudged": 1})), "{task}");
    assert_eq!(rows(&client, &task).await.len(), 5);
    let task = ended(&client, &client.post(PREFERENCES, &body("/never")).await.ok()).await;
    assert_eq!((&task["status"], &task["error"]["code"]), (&json!("failed"), &json!("grader_failed")), "{task}");
    let message = task["error"]["message"].as_str().unwrap();
    assert!(message.starts_with("4 of 6 rows have no label: it answers neither 1 nor 2 (3 attempts)"), "{message}");
}

/// What was labelled before a kill is not asked for again.
#[tokio::test]
async fn a_task_outlives_its_process_and_can_be_cancelled() {
    let gate = Arc::new(tokio::sync::Semaphore::new(12));
    let site = Elsewhere::start({
        let gate = gate.clone();
        move |_, asked| {
            let gate = gate.clone();
            async move {
                gate.acquire().await.unwrap().forget();
                let [a, b] = shown(&asked);
                told(if a.len() > b.len() { 0.9 } else { 0.2 })
            }
        }
    })
    .await;
    let mut server = Server::with(&["--outbound-allow", &site.host]);
    let client = server.client();
    let file = pairs(&client, 20).await;
    let body = json!({"file": file, "judge": {"type": "model", "model": "big", "endpoint": site.url("/v1")}});
    let queued = client.post_once("once", PREFERENCES, &body).await.ok();
    assert_eq!(client.post_once("once", PREFERENCES, &body).await.ok()["id"], queued["id"]);
    let path = format!("{PREFERENCES}/{}", queued["id"].as_str().unwrap());
    let done = async |client: &Client| client.get(&path).await.ok()["done"].as_i64().unwrap();
    while done(&client).await < 2 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    client.delete(&format!("/v1/files/{file}")).await.error(409, "file_in_use", None);
    server.kill_and_restart();
    let client = server.client();
    let before = done(&client).await;
    assert!((2..20).contains(&before), "{before}");
    gate.add_permits(1000);
    let task = ended(&client, &queued).await;
    assert_eq!((&task["status"], &task["done"]), (&json!("succeeded"), &json!(20)), "{task}");
    let made = rows(&client, &task).await;
    assert!(made.len() == 20 && made.iter().enumerate().all(|(i, row)| row["input"]["messages"] == question(i)));
    // Two questions a pair, and again for the pairs that were under way.
    let asked = site.asked().len() as i64;
    assert!(asked <= 2 * 20 + 2 * 8, "{asked}");

    gate.forget_permits(2000);
    let queued = client.post(PREFERENCES, &body).await.ok();
    while client.get(&format!("{PREFERENCES}/{}", queued["id"].as_str().unwrap())).await.ok()["status"] != "running" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let cancel = format!("{PREFERENCES}/{}/cancel", queued["id"].as_str().unwrap());
    client.post(&cancel, &json!({})).await.ok();
    let task = ended(&client, &queued).await;
    assert_eq!((&task["status"], &task["result_file"]), (&json!("cancelled"), &Value::Null));
    client.post(&cancel, &json!({})).await.error(400, "invalid_state", None);
}

#[tokio::test]
async fn what_is_wrong_is_said_by_field() {
    let server = Server::with(&["--workers", "0"]);
    let client = server.client();
    let (asked, paired) = (prompts(&client, 3).await, pairs(&client, 3).await);
    let chat = client.file(3).await;
    let judge = json!({"type": "model", "model": BASE});
    let with = |changes: Value| {
        let mut body = json!({"file": asked, "model": BASE, "judge": judge});
        body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        body.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        body
    };
    let grader = json!({"type": "grader", "grader": near("x")});
    let far = |endpoint: &str| json!({"judge": {"type": "model", "model": "x", "endpoint": endpoint}});
    for (changes, code, param) in [
        (json!({"file": null}), "missing_required_parameter", "file"),
        (json!({"judge": null}), "missing_required_parameter", "judge"),
        (json!({"model": null}), "missing_required_parameter", "model"),
        (json!({"file": paired}), "unsupported_parameter", "model"),
        (json!({"file": chat}), "dataset_wrong_format", "file"),
        (json!({"judge": {"type": "oracle"}}), "invalid_judge", "judge"),
        (json!({"judge": {"type": "model"}}), "invalid_judge", "judge"),
        (json!({"judge": {"type": "model", "model": ""}}), "invalid_judge", "judge.model"),
        (json!({"judge": {"type": "model", "model": BASE, "surprise": 1}}), "invalid_judge", "judge"),
        (
            json!({"judge": {"type": "grader", "grader": {"type": "regex", "name": "r", "input": "a", "pattern": "("}}}),
            "spec_invalid_grader",
            "judge.grader.pattern",
        ),
        (far("http://example.com/v1"), "address_refused", "judge.endpoint"),
        (far("https://10.0.0.1/v1"), "address_refused", "judge.endpoint"),
        (json!({"criteria": []}), "invalid_criteria", "criteria"),
        (json!({"criteria": [" "]}), "invalid_criteria", "criteria"),
        (json!({"criteria": [1]}), "invalid_criteria", "criteria"),
        (json!({"criteria": "x".repeat(2001)}), "invalid_criteria", "criteria"),
        (json!({"criteria": "be kind", "judge": grader}), "invalid_criteria", "criteria"),
        (json!({"sampling": {"temperature": 0}}), "out_of_range", "sampling.temperature"),
        (json!({"sampling": {"top_p": 1.5}}), "out_of_range", "sampling.top_p"),
        (json!({"sampling": {"max_completion_tokens": 0}}), "out_of_range", "sampling.max_completion_tokens"),
        (json!({"sampling": {"n": 3}}), "unknown_parameter", "sampling.n"),
        (json!({"min_margin": 0.5}), "out_of_range", "min_margin"),
        (json!({"max_dropped": -0.1}), "out_of_range", "max_dropped"),
        (json!({"metadata": [1]}), "invalid_metadata", "metadata"),
        (json!({"surprise": 1}), "unknown_parameter", "surprise"),
    ] {
        client.post(PREFERENCES, &with(changes)).await.error(400, code, Some(param));
    }
    for (changes, code, param) in [
        (json!({"judge": {"type": "model", "model": "ft:nobody"}}), "model_not_found", "judge.model"),
        (json!({"model": "ft:nobody"}), "model_not_found", "model"),
        (json!({"file": "file-nobody"}), "not_found", "file"),
    ] {
        client.post(PREFERENCES, &with(changes)).await.error(404, code, Some(param));
    }
    // Pairs with equal or empty sides are found when the request comes.
    let side = |text: &str| json!([{"role": "assistant", "content": text}]);
    let pair = |a: &str, b: &str| json!({"input": {"messages": question(0)}, "preferred_output": side(a), "non_preferred_output": side(b)});
    for (a, b, code) in [("same", "same", "dataset_equal_sides"), ("", "b", "dataset_empty_content")] {
        let file = upload(&client, [pair("x", "y"), pair(a, b)].into_iter()).await;
        let message =
            client.post(PREFERENCES, &with(json!({"file": file, "model": null}))).await.error(400, code, Some("file"));
        assert!(message.starts_with("line 2: "), "{message}");
    }
    // Nobody works here: a queued task ends at once.
    let queued = client.post(PREFERENCES, &with(json!({}))).await.ok();
    assert_eq!(queued["status"], "queued");
    let cancel = format!("{PREFERENCES}/{}/cancel", queued["id"].as_str().unwrap());
    assert_eq!(client.post(&cancel, &json!({})).await.ok()["status"], "cancelled");
}
