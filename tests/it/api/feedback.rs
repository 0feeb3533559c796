//! The loop from use to training: answers kept when asked, judged, made a dataset, trained on.

use attune::{
    db::Db,
    domain::{Caller, Feedback, StoredCompletion, feedback::Judgement},
};
use serde_json::{Value, json};

use crate::support::server::{Answer, BASE, Client, Server};

const CHAT: &str = "/v1/chat/completions";
const FEEDBACK: &str = "/v1/feedback";

fn chat(question: &str, extra: Value) -> Value {
    let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": question}], "max_tokens": 6,
                          "ignore_eos": true, "seed": 3, "store": true});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// A kept completion: its id and its answers.
async fn kept(client: &Client, question: &str, extra: Value) -> (String, Vec<String>) {
    let answer = client.post(CHAT, &chat(question, extra)).await.ok();
    let texts = answer["choices"].as_array().unwrap().iter();
    let texts = texts.map(|choice| choice["message"]["content"].as_str().unwrap().to_owned()).collect();
    (answer["id"].as_str().unwrap().to_owned(), texts)
}

async fn say(client: &Client, body: Value) -> Answer {
    client.post(FEEDBACK, &body).await
}

/// The rows of an export.
async fn export(client: &Client, body: Value) -> (Vec<Value>, Value) {
    let made = client.post("/v1/feedback/export", &body).await.ok();
    let path = format!("/v1/files/{}/content", made["file"]["id"].as_str().unwrap());
    let text = match client.get(&path).await.ok() {
        Value::String(text) => text,
        one => format!("{one}\n"),
    };
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(made["rows"], rows.len());
    (rows, made)
}

#[tokio::test]
async fn answers_are_kept_when_asked_and_only_then() {
    let server = Server::start();
    let client = server.client();
    let (id, texts) = kept(&client, "Q", json!({"n": 2})).await;
    let found = client.get(&format!("{CHAT}/{id}")).await.ok();
    assert_eq!(found["messages"], json!([{"role": "user", "content": "Q"}]));
    let contents: Vec<_> =
        found["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].clone()).collect();
    assert_eq!(json!(contents), json!(texts));

    // A stream is kept too, by the time it has ended.
    let chunks = client.stream(CHAT, &chat("Q", json!({"n": 2, "stream": true}))).await;
    let found = client.get(&format!("{CHAT}/{}", chunks[0]["id"].as_str().unwrap())).await.ok();
    assert_eq!(found["choices"][1]["message"]["content"], texts[1]);

    for extra in [json!({"store": false}), json!({"store": null})] {
        let (id, _) = kept(&client, "Q", extra).await;
        client.get(&format!("{CHAT}/{id}")).await.error(404, "not_found", Some("id"));
        say(&client, json!({"completion_id": id, "thumb": "up"})).await.error(404, "not_found", Some("completion_id"));
    }
    let stranger = server.client_with(&server.create_key("other", "all"));
    stranger.get(&format!("{CHAT}/{id}")).await.error(404, "not_found", Some("id"));
    stranger.delete(&format!("{CHAT}/{id}")).await.error(404, "not_found", Some("id"));
    say(&stranger, json!({"completion_id": id, "thumb": "up"})).await.error(404, "not_found", Some("completion_id"));

    say(&client, json!({"completion_id": id, "thumb": "up"})).await.ok();
    client.delete(&format!("{CHAT}/{id}")).await.ok();
    client.get(&format!("{CHAT}/{id}")).await.error(404, "not_found", Some("id"));
    assert_eq!(client.get(FEEDBACK).await.ok()["data"], json!([]), "what was said of it went with it");

    let strict = Server::with(&["--completion-retention", "0"]);
    let refused = strict.client().post(CHAT, &chat("Q", json!({}))).await;
    refused.error(400, "unsupported_parameter", Some("store"));
    kept(&strict.client(), "Q", json!({"store": false})).await;
}

/// Nobody reads what is older than the server keeps answers, whether or not anything new was kept since.
#[tokio::test]
async fn old_answers_are_forgotten_unasked() {
    let server = Server::with(&["--completion-retention", "2"]);
    let client = server.client();
    let db = Db::connect(&format!("sqlite:{}", server.data().join("attune.db").display())).await.unwrap();
    let age = async |id: &str, days: i64| {
        let kept = StoredCompletion {
            id: id.to_owned(),
            project: "default".to_owned(),
            model: BASE.to_owned(),
            fingerprint: "g".to_owned(),
            created_at: chrono::Utc::now().timestamp() - days * 24 * 3600,
            messages: vec![json!({"role": "user", "content": "Q"})],
            choices: vec!["A".to_owned()],
        };
        db.keep_completion(&kept, 1 << 40).await.unwrap();
        let caller = Caller { project: "default".to_owned(), key: "key-a".to_owned() };
        let said = Feedback {
            id: format!("fb-{id}"),
            project: "default".to_owned(),
            completion_id: id.to_owned(),
            choice: 0,
            judgement: Judgement::Thumb { up: true },
            comment: None,
            created_at: kept.created_at,
        };
        db.insert_feedback(&caller, &said, None).await.unwrap();
    };
    age("new", 1).await;
    age("old", 3).await;
    let listed = client.get(FEEDBACK).await.ok();
    let ids: Vec<&Value> = listed["data"].as_array().unwrap().iter().map(|said| &said["id"]).collect();
    assert_eq!(ids, ["fb-new"]);
    age("old", 3).await;
    client.get(&format!("{CHAT}/old")).await.error(404, "not_found", Some("id"));
    age("old", 3).await;
    assert_eq!(export(&client, json!({"format": "sft"})).await.0.len(), 1);
    assert!(db.completion("default", "old").await.is_err(), "it is still there");
    client.get(&format!("{CHAT}/new")).await.ok();
}

#[tokio::test]
async fn what_is_said_becomes_rows_of_each_format() {
    let server = Server::start();
    let client = server.client();
    let (a, good) = kept(&client, "A", json!({"n": 2})).await;
    let (b, bad) = kept(&client, "A", json!({"seed": 8})).await;
    let (c, wrong) = kept(&client, "C", json!({})).await;
    assert!(good[0] != good[1] && good[0] != bad[0], "the answers do not differ");
    let judgements = [
        json!({"completion_id": a, "choice": 0, "thumb": "up", "comment": "fine"}),
        json!({"completion_id": b, "rating": 2}),
        json!({"completion_id": c, "correction": "C it is"}),
        json!({"completion_id": a, "choice": 1, "preferred_over": {"completion_id": b}}),
        json!({"completion_id": c, "rating": 3}),
    ];
    for judgement in &judgements {
        let said = say(&client, judgement.clone()).await.ok();
        for (key, value) in judgement.as_object().unwrap().iter().filter(|(key, _)| *key != "preferred_over") {
            assert_eq!(said[key], *value);
        }
    }
    assert_eq!(client.get(&format!("{FEEDBACK}?limit=2")).await.ok()["data"].as_array().unwrap().len(), 2);

    let user = |text: &str| json!({"role": "user", "content": text});
    let says = |text: &str| json!({"role": "assistant", "content": text});
    let (rows, made) = export(&client, json!({"format": "preference"})).await;
    let pair = |question: &str, better: &str, worse: &str| {
        json!({"input": {"messages": [user(question)]}, "preferred_output": [says(better)],
               "non_preferred_output": [says(worse)]})
    };
    let expected = [pair("C", "C it is", &wrong[0]), pair("A", &good[1], &bad[0]), pair("A", &good[0], &bad[0])];
    assert_eq!(rows, expected);
    assert_eq!(made["unused"], 1, "a rating in the middle says nothing");

    let (rows, _) = export(&client, json!({"format": "sft"})).await;
    let row = |question: &str, answer: &str| json!({"messages": [user(question), says(answer)]});
    assert_eq!(rows, [row("C", "C it is"), row("A", &good[1]), row("A", &good[0])]);

    let (rows, made) = export(&client, json!({"format": "kto", "min_rating": 3})).await;
    let labels: Vec<_> =
        rows.iter().map(|row| (row["completion"][0]["content"].as_str().unwrap(), &row["label"])).collect();
    let (yes, no) = (&json!(true), &json!(false));
    let expected = [("C it is", yes), (&wrong[0], no), (&good[1], yes), (&bad[0], no), (&good[0], yes), (&bad[0], no)];
    assert_eq!(labels[..6], expected);
    assert_eq!((labels[6], &made["unused"]), ((wrong[0].as_str(), yes), &json!(0)));

    let refuse = |body: Value| {
        let client = &client;
        async move { client.post("/v1/feedback/export", &body).await }
    };
    refuse(json!({"format": "dpo"})).await.error(400, "out_of_range", Some("format"));
    refuse(json!({})).await.error(400, "missing_required_parameter", Some("format"));
    refuse(json!({"format": "sft", "min_rating": 6})).await.error(400, "out_of_range", Some("min_rating"));
    refuse(json!({"format": "sft", "max_rating": 4})).await.error(400, "out_of_range", Some("max_rating"));
    refuse(json!({"format": "sft", "until": 5})).await.error(400, "no_feedback", Some("format"));
    refuse(json!({"format": "sft", "model": "x"})).await.error(400, "no_feedback", Some("format"));
    refuse(json!({"format": "sft", "when": 5})).await.error(400, "unknown_parameter", Some("when"));
}

#[tokio::test]
async fn judgements_that_say_nothing_are_refused_by_field() {
    let server = Server::start();
    let client = server.client();
    let (id, texts) = kept(&client, "A", json!({"n": 2})).await;
    let (other, _) = kept(&client, "B", json!({})).await;
    for (extra, code, param) in [
        (json!({}), "invalid_feedback", "thumb"),
        (json!({"thumb": "up", "rating": 4}), "invalid_feedback", "thumb"),
        (json!({"thumb": "sideways"}), "invalid_type", "thumb"),
        (json!({"rating": 0}), "out_of_range", "rating"),
        (json!({"rating": 6}), "out_of_range", "rating"),
        (json!({"choice": 2, "thumb": "up"}), "out_of_range", "choice"),
        (json!({"correction": texts[0]}), "invalid_correction", "correction"),
        (json!({"correction": ""}), "invalid_correction", "correction"),
        (
            json!({"preferred_over": {"completion_id": other}}),
            "different_conversations",
            "preferred_over.completion_id",
        ),
        (json!({"preferred_over": {}}), "equal_answers", "preferred_over.completion_id"),
        (json!({"preferred_over": {"choice": 2}}), "out_of_range", "preferred_over.choice"),
        (json!({"thumb": "up", "comment": "c".repeat(4097)}), "out_of_range", "comment"),
        (json!({"thumbs": "up"}), "unknown_parameter", "thumbs"),
    ] {
        let mut body = json!({"completion_id": id});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        say(&client, body).await.error(400, code, Some(param));
    }
    assert_eq!(client.get(FEEDBACK).await.ok()["data"], json!([]));

    let body = json!({"completion_id": id, "preferred_over": {"choice": 1}});
    let said = client.post_once("k", FEEDBACK, &body).await.ok();
    assert_eq!(client.post_once("k", FEEDBACK, &body).await.ok(), said, "said once");
    client.delete(&format!("{FEEDBACK}/{}", said["id"].as_str().unwrap())).await.ok();
    client.delete(&format!("{FEEDBACK}/{}", said["id"].as_str().unwrap())).await.error(404, "not_found", Some("id"));
}

#[tokio::test]
async fn a_job_trains_on_feedback_in_one_call() {
    let server = Server::start();
    let client = server.client();
    for question in ["A", "B", "C"] {
        let (id, _) = kept(&client, question, json!({})).await;
        say(&client, json!({"completion_id": id, "correction": format!("{question}!")})).await.ok();
    }
    let mut body = json!({"model": BASE, "feedback": {"model": BASE}, "training": {"max_steps": 2}});
    let grader = json!({"type": "string_check", "name": "same", "operation": "eq",
                        "input": "{{sample.output_text}}", "reference": "yes"});
    let mut graded = body.clone();
    graded["method"] = json!({"type": "grpo", "grpo": {"grader": grader}});
    client.post("/v1/fine_tuning/jobs", &graded).await.error(400, "unsupported_parameter", Some("feedback"));
    let job = client.post("/v1/fine_tuning/jobs", &body).await.ok();
    let ended = client.end_of(job["id"].as_str().unwrap()).await;
    assert_eq!(ended["status"], "succeeded", "{ended}");
    let path = format!("/v1/files/{}/content", job["training_file"].as_str().unwrap());
    let Value::String(rows) = client.get(&path).await.ok() else { panic!("no rows") };
    assert_eq!(rows.lines().count(), 3);

    body["feedback"]["model"] = json!("x");
    client.post("/v1/fine_tuning/jobs", &body).await.error(400, "no_feedback", Some("feedback.format"));
    body["feedback"] = json!({"from": 3});
    client.post("/v1/fine_tuning/jobs", &body).await.error(400, "unknown_parameter", Some("feedback.from"));
    body["feedback"] = json!({});
    body["training_file"] = job["training_file"].clone();
    client.post("/v1/fine_tuning/jobs", &body).await.error(400, "given_twice", Some("feedback"));
}
