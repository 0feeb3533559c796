//! Labels of texts and tags of words through the running server: upload, report, job, events, answers.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server, chat_rows};

const JOBS: &str = "/v1/fine_tuning/jobs";

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

/// Texts whose label hangs on their last letters.
fn texts(n: usize) -> String {
    let row = |i: usize| match i % 2 {
        0 => json!({"text": format!("thing {i} is fine"), "label": "good"}),
        _ => json!({"text": format!("thing {i} broke"), "label": "bad"}),
    };
    lines(&(0..n).map(row).collect::<Vec<_>>())
}

/// Words whose tag hangs on themselves.
fn words(n: usize) -> String {
    let row = |i: usize| json!({"tokens": ["At", "Rome", format!("{}", i % 2), "Ann", "Lee"], "tags": ["O", "B-LOC", "O", "B-PER", "I-PER"]});
    lines(&(0..n).map(row).collect::<Vec<_>>())
}

async fn file(client: &Client, rows: String) -> String {
    client.upload(rows).await.ok()["id"].as_str().unwrap().to_owned()
}

fn job(file: &str, name: &str, knobs: Value) -> Value {
    json!({"model": BASE, "training_file": file, "suffix": "labels",
           "method": {"type": name, name: {"hyperparameters": knobs}},
           "adapter": {"type": "lora", "r": 4, "alpha": 12}, "training": {"learning_rate": 0.01}})
}

/// A job followed to its end, and its metrics, oldest first.
async fn follow(client: &Client, body: &Value) -> (Value, Vec<Value>) {
    let queued = client.post(JOBS, body).await.ok();
    let id = queued["id"].as_str().unwrap();
    let events = client.events(id, None).await;
    let ended = client.get(&format!("{JOBS}/{id}")).await.ok();
    assert_eq!(ended["status"], "succeeded", "{ended}");
    let metrics = events.iter().filter(|(_, event)| event["type"] == "metrics");
    (ended, metrics.map(|(_, event)| event["data"].clone()).collect())
}

#[tokio::test]
async fn labels_from_upload_to_answer() {
    let server = Server::start();
    let client = server.client();
    let (train, valid) = (file(&client, texts(12)).await, file(&client, texts(4)).await);
    let report = client.get(&format!("/v1/files/{train}/report?model={BASE}")).await.ok();
    assert_eq!((&report["format"], &report["usable_rows"]), (&json!("labelled_text"), &json!(12)));
    assert_eq!(report["labels"][0], json!({"label": "bad", "count": 6, "first_line": 2}));
    let mut body = job(&train, "sequence_classification", json!({"n_epochs": 6, "batch_size": 4}));
    body["validation_file"] = json!(valid);
    let (ended, metrics) = follow(&client, &body).await;
    assert_eq!(ended["method"]["sequence_classification"]["hyperparameters"]["labels"], json!(["bad", "good"]));
    let last = metrics.last().unwrap();
    for figure in ["accuracy", "f1", "eval_accuracy", "eval_f1", "full_valid_loss"] {
        assert!(last[figure].is_f64(), "{figure}: {last}");
    }
    assert_eq!((&last["eval_accuracy"], &last["eval_f1"]), (&json!(1.0), &json!(1.0)), "{metrics:?}");

    let model = &ended["fine_tuned_model"];
    let ask = json!({"model": model, "input": ["thing 40 is fine", {"text": "thing 41 broke"}]});
    let found = client.post("/v1/classify", &ask).await.ok();
    assert_eq!((&found["data"][0]["label"], &found["data"][1]["label"]), (&json!("good"), &json!("bad")), "{found}");
    for answer in found["data"].as_array().unwrap() {
        let labels = answer["labels"].as_array().unwrap();
        let probability = |i: usize| labels[i]["probability"].as_f64().unwrap();
        assert!((probability(0) + probability(1) - 1.0).abs() < 1e-9 && probability(0) >= probability(1), "{answer}");
        assert_eq!(labels[0]["label"], answer["label"]);
        assert!(answer.get("score").is_none() && answer.get("tags").is_none());
    }

    // Other texts are not for it, and it does not write.
    let chat = json!({"model": model, "messages": [{"role": "user", "content": "hi"}]});
    client.post("/v1/chat/completions", &chat).await.error(400, "wrong_task", Some("model"));
    for input in [json!({"tokens": ["a"]}), json!({"messages": chat_messages()})] {
        let message = client.post("/v1/classify", &json!({"model": model, "input": input})).await;
        let message = message.error(400, "wrong_task", Some("model"));
        assert!(message.contains("labels texts"), "{message}");
    }
    let wrong = [
        (json!([3]), "not_an_object"),
        (json!([" "]), "empty_content"),
        (json!({"text": "a", "label": "good"}), "unknown_field"),
        (json!({"text": "long ".repeat(600)}), "context_length_exceeded"),
    ];
    for (input, code) in wrong {
        let answer = client.post("/v1/classify", &json!({"model": model, "input": input})).await;
        answer.error(400, code, Some("input.0"));
    }

    // It goes on with its own labels, under its own objective.
    let mut on = job(&train, "sequence_classification", json!({"n_epochs": 1}));
    on["model"] = model.clone();
    on.as_object_mut().unwrap().remove("adapter");
    let (ended, metrics) = follow(&client, &on).await;
    assert_eq!(metrics[0]["accuracy"], 1.0, "{metrics:?}");
    assert_eq!(ended["method"]["sequence_classification"]["hyperparameters"]["labels"], json!(["bad", "good"]));
    on["method"] = json!({"type": "supervised"});
    client.post(JOBS, &on).await.error(400, "adapter_labels", Some("model"));
    on["method"] = json!({"type": "sequence_classification",
                          "sequence_classification": {"hyperparameters": {"labels": ["good", "bad"]}}});
    client.post(JOBS, &on).await.error(400, "adapter_labels", Some("model"));
}

fn chat_messages() -> Value {
    json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
}

#[tokio::test]
async fn tags_from_upload_to_answer_and_back_as_pefts_files() {
    let server = Server::start();
    let client = server.client();
    let train = file(&client, words(8)).await;
    let mut body = job(&train, "token_classification", json!({"n_epochs": 8, "batch_size": 2}));
    body["training"]["validation_split"] = json!(0.25);
    let (ended, metrics) = follow(&client, &body).await;
    let last = metrics.last().unwrap();
    assert_eq!((&last["eval_accuracy"], &last["eval_f1"]), (&json!(1.0), &json!(1.0)), "{metrics:?}");
    // Five words a row.
    assert_eq!(ended["trained_tokens"], json!(6 * 5 * 8));
    let model = &ended["fine_tuned_model"];
    let input = json!({"tokens": ["At", "Rome", "1", "Ann", "Lee"]});
    let ask = |model: &Value| json!({"model": model, "input": input});
    let found = client.post("/v1/classify", &ask(model)).await.ok();
    let tags: Vec<&str> =
        found["data"][0]["tags"].as_array().unwrap().iter().map(|tag| tag["label"].as_str().unwrap()).collect();
    assert_eq!(tags, ["O", "B-LOC", "O", "B-PER", "I-PER"], "{found}");
    let text = client.post("/v1/classify", &json!({"model": model, "input": "At Rome"})).await;
    text.error(400, "wrong_task", Some("model"));

    // Out and in again: the same model.
    let adapters = client.get("/v1/adapters").await.ok();
    let record = adapters["data"].as_array().unwrap().iter().find(|record| record["model"] == *model).unwrap();
    let path = format!("/v1/adapters/{}/download?format=zip", record["id"].as_str().unwrap());
    let packed = client.request(Method::GET, &path).send().await.unwrap().bytes().await.unwrap();
    let part = reqwest::multipart::Part::bytes(packed.to_vec()).file_name("adapter.zip");
    let form = reqwest::multipart::Form::new().text("model", BASE).part("file", part);
    let imported = crate::support::server::answer(client.request(Method::POST, "/v1/adapters").multipart(form)).await;
    let again = client.post("/v1/classify", &ask(&imported.ok()["model"])).await.ok();
    assert_eq!(again["data"], found["data"]);
    let merge = client.post(&format!("/v1/adapters/{}/merge", record["id"].as_str().unwrap()), &json!({})).await;
    merge.error(400, "not_mergeable", Some("adapter_id"));
}

/// Gates of a whole text learn only where a head judges it, and then are a file of AdapterHub's too.
#[tokio::test]
async fn gates_of_a_whole_text_go_to_adapterhub() {
    let server = Server::start();
    let client = server.client();
    let train = file(&client, texts(12)).await;
    let unipelt = |mode: &str| {
        let mut body = job(&train, "sequence_classification", json!({"n_epochs": 8, "batch_size": 4}));
        body["adapter"] = json!({"type": "unipelt", "lora_r": 4, "prefix_length": 4, "gate_mode": mode});
        body
    };
    let mut writes = unipelt("sequence_mean");
    (writes["method"], writes["training_file"]) = (json!({"type": "supervised"}), json!(client.file(4).await));
    let message = client.post(JOBS, &writes).await.error(400, "spec_conflict", Some("adapter.gate_mode"));
    assert!(message.contains("supervised") && message.contains("behind it"), "{message}");

    let ask = |model: &Value| json!({"model": model, "input": ["thing 40 is fine", "thing 41 broke"]});
    let mut packed = Vec::new();
    for mode in ["sequence_mean", "token"] {
        let (ended, _) = follow(&client, &unipelt(mode)).await;
        let model = &ended["fine_tuned_model"];
        let found = client.post("/v1/classify", &ask(model)).await.ok();
        assert_eq!(
            (&found["data"][0]["label"], &found["data"][1]["label"]),
            (&json!("good"), &json!("bad")),
            "{found}"
        );
        let path = format!("/v1/adapters/{}/download?as=adapterhub", model.as_str().unwrap());
        let sent = client.request(Method::GET, &path).send().await.unwrap();
        packed.push((sent.status().as_u16(), sent.bytes().await.unwrap()));
    }
    let [(200, archive), (400, refused)] = &packed[..] else { panic!("{packed:?}") };
    let refused: Value = serde_json::from_slice(refused).unwrap();
    assert_eq!((&refused["error"]["param"], &refused["error"]["code"]), (&json!("as"), &json!("unsupported")));
    assert!(refused["error"]["message"].as_str().unwrap().contains("gate_mode token"), "{refused}");
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(archive.to_vec())).unwrap();
    let config: Value = serde_json::from_reader(archive.by_name("head_config.json").unwrap()).unwrap();
    assert_eq!(config["config"]["label2id"], json!({"bad": 0, "good": 1}));
    for name in ["adapter_config.json", "adapter.safetensors", "model_head.safetensors"] {
        assert!(archive.by_name(name).is_ok(), "{name}");
    }
}

#[tokio::test]
async fn what_does_not_fit_is_named() {
    let server = Server::start();
    let client = server.client();
    let (texts, words) = (file(&client, texts(4)).await, file(&client, words(3)).await);
    let chats = file(&client, chat_rows(3)).await;
    for (name, file, part) in [
        ("token_classification", &texts, "token_classification reads tagged words: tokens and tags"),
        ("sequence_classification", &words, "sequence_classification reads labelled texts: text and label"),
        ("sequence_classification", &chats, "format chat"),
        ("supervised", &texts, "format labelled_text"),
    ] {
        let message = client.post(JOBS, &job(file, name, json!({}))).await;
        let message = message.error(400, "dataset_wrong_format", Some("training_file"));
        assert!(message.contains(part), "{message}");
    }
    // Without tags there is nothing to learn.
    let untagged = file(&client, lines(&[json!({"tokens": ["a"], "tags": ["O"]}), json!({"tokens": ["a"]})])).await;
    let message = client.post(JOBS, &job(&untagged, "token_classification", json!({}))).await;
    let message = message.error(400, "dataset_missing_field", Some("training_file"));
    assert!(message.starts_with("line 2: the row has no `tags`"), "{message}");
    let one = file(&client, lines(&[json!({"text": "a", "label": "x"}), json!({"text": "b", "label": "x"})])).await;
    let message = client.post(JOBS, &job(&one, "sequence_classification", json!({}))).await;
    message.error(400, "dataset_one_label", Some("training_file"));

    let strange =
        file(&client, lines(&[json!({"text": "a", "label": "good"}), json!({"text": "b", "label": "odd"})])).await;
    let mut body = job(&texts, "sequence_classification", json!({}));
    body["validation_file"] = json!(strange);
    let message = client.post(JOBS, &body).await.error(400, "dataset_unknown_label", Some("validation_file"));
    assert_eq!(message, "line 2: the label odd is not one of bad, good");
    let named = job(&strange, "sequence_classification", json!({"labels": ["good", "bad"]}));
    client.post(JOBS, &named).await.error(400, "dataset_unknown_label", Some("training_file"));

    let path = |name: &str| format!("method.sequence_classification.hyperparameters.{name}");
    for (knobs, field, code) in [
        (json!({"labels": ["good"]}), "labels", "spec_out_of_range"),
        (json!({"labels": ["good", "good", "bad"]}), "labels", "spec_given_twice"),
        (json!({"labels": ["good", ""]}), "labels", "spec_out_of_range"),
        (json!({"labels": "good"}), "labels", "spec_invalid_type"),
        (json!({"word_token": "last"}), "word_token", "spec_unknown_field"),
    ] {
        let answer = client.post(JOBS, &job(&texts, "sequence_classification", knobs.clone())).await;
        answer.error(400, code, Some(&path(field)));
    }
    let answer = client.post(JOBS, &job(&words, "token_classification", json!({"word_token": "middle"}))).await;
    answer.error(400, "spec_invalid_type", Some("method.token_classification.hyperparameters.word_token"));

    let mut body = job(&texts, "sequence_classification", json!({}));
    body.as_object_mut().unwrap().remove("training_file");
    body["feedback"] = json!({});
    client.post(JOBS, &body).await.error(400, "unsupported_parameter", Some("feedback"));

    // There is no lm_head beside a head of labels.
    for (adapter, param) in [
        (json!({"type": "lora", "target_modules": ["q_proj", "lm_head"]}), "adapter.target_modules"),
        (json!({"type": "dora", "target_modules": ["q_proj", "lm_head"]}), "adapter.target_modules"),
        (
            json!({"type": "lora", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
            "adapter.modules_to_save",
        ),
    ] {
        let mut body = job(&texts, "sequence_classification", json!({}));
        body["adapter"] = adapter;
        client.post(JOBS, &body).await.error(400, "spec_conflict", Some(param));
    }
}
