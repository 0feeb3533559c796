//! Pages, events and their streams, files as they were.

use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server, chat_rows};

/// Walks a list in pages and gives the ids; each page must continue the one before.
async fn walk(client: &Client, path: &str, limit: usize) -> Vec<String> {
    let mut ids: Vec<String> = Vec::new();
    let separator = if path.contains('?') { '&' } else { '?' };
    loop {
        let after = ids.last().map_or(String::new(), |id| format!("&after={id}"));
        let page = client.get(&format!("{path}{separator}limit={limit}{after}")).await.ok();
        assert_eq!(page["object"], "list");
        let data = page["data"].as_array().unwrap();
        assert!(data.len() <= limit);
        assert_eq!(page["first_id"], data.first().map_or(Value::Null, |x| x["id"].clone()));
        assert_eq!(page["last_id"], data.last().map_or(Value::Null, |x| x["id"].clone()));
        ids.extend(data.iter().map(|x| x["id"].as_str().unwrap().to_owned()));
        if page["has_more"] == false {
            return ids;
        }
        assert_eq!(data.len(), limit, "a page that is not the last is full");
    }
}

#[tokio::test]
async fn files_come_in_pages_and_come_back_as_they_were() {
    let server = Server::start();
    let client = server.client();
    let mut made = Vec::new();
    for rows in 1..=5 {
        made.push(client.file(rows).await);
    }
    let all = walk(&client, "/v1/files", 100).await;
    let (mut sorted, mut expected) = (all.clone(), made.clone());
    sorted.sort();
    expected.sort();
    assert_eq!(sorted, expected);
    for limit in [1, 2, 5] {
        assert_eq!(walk(&client, "/v1/files", limit).await, all, "limit {limit}");
    }
    let mut ascending = walk(&client, "/v1/files?order=asc", 2).await;
    ascending.reverse();
    assert_eq!(ascending, all);
    assert_eq!(walk(&client, "/v1/files?purpose=batch", 2).await, Vec::<String>::new());
    for (path, param) in [("limit=0", "limit"), ("limit=10001", "limit"), ("order=up", "order")] {
        client.get(&format!("/v1/files?{path}")).await.error(400, "out_of_range", Some(param));
    }
    assert_eq!(client.get("/v1/files?unknown=1").await.status, 400);
    assert_eq!(client.get("/v1/files?after=file-none").await.status, 404);

    let file = &made[2];
    let content = client.get(&format!("/v1/files/{file}/content")).await.ok();
    assert_eq!(content, Value::String(chat_rows(3)));
    let object = client.get(&format!("/v1/files/{file}")).await.ok();
    assert_eq!((&object["bytes"], &object["status"]), (&json!(chat_rows(3).len()), &json!("processed")));
    assert_eq!(client.delete(&format!("/v1/files/{file}")).await.ok()["deleted"], true);
    client.get(&format!("/v1/files/{file}/content")).await.error(404, "not_found", Some("id"));
    client.delete(&format!("/v1/files/{file}")).await.error(404, "not_found", Some("id"));
}

#[tokio::test]
async fn the_parts_of_an_upload_come_in_any_order() {
    use reqwest::{Method, multipart};
    let server = Server::start();
    let client = server.client();
    let file = || multipart::Part::bytes(chat_rows(2).into_bytes()).file_name("a.jsonl");
    let first = multipart::Form::new().part("file", file()).text("purpose", "fine-tune");
    let last = multipart::Form::new().text("purpose", "fine-tune").part("file", file());
    for form in [first, last] {
        let sent = client.request(Method::POST, "/v1/files").multipart(form);
        let object = crate::support::server::answer(sent).await.ok();
        assert_eq!((&object["purpose"], &object["filename"]), (&json!("fine-tune"), &json!("a.jsonl")));
    }
}

#[tokio::test]
async fn a_report_counts_what_a_job_would_see() {
    let server = Server::start();
    let client = server.client();
    let long =
        json!({"messages": [{"role": "user", "content": "a ".repeat(600)}, {"role": "assistant", "content": "b"}]});
    let rows = format!("{}{}{long}\n", chat_rows(2), chat_rows(1));
    let file = client.upload(rows).await.ok();
    let report = client.get(&format!("/v1/files/{}/report", file["id"].as_str().unwrap())).await.ok();
    let counts = ["rows", "usable_rows", "duplicate_rows", "too_long_rows", "error_count", "max_seq_len"];
    let found: Vec<i64> = counts.iter().map(|name| report[name].as_i64().unwrap()).collect();
    assert_eq!(found, [4, 3, 1, 1, 0, 512], "{report}");
    assert_eq!((&report["format"], &report["model"]), (&json!("chat"), &json!(BASE)));
    // One byte, one token: the assistant's words and the end of its turn are trained on.
    let example = &report["examples"][0];
    assert_eq!(example["text"], "<|im_start|>user\nQuestion 0<|im_end|>\n<|im_start|>assistant\nAnswer 0<|im_end|>\n");
    assert_eq!(example["trained_tokens"], "Answer 0".len() as i64 + 1, "{example}");
}

#[tokio::test]
async fn events_are_paged_streamed_and_resumed() {
    let server = Server::start();
    let client = server.client();
    let job = client.trained(&client.file(6).await).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    let id = job["id"].as_str().unwrap();
    let stream = client.events(id, None).await;
    let places: Vec<usize> = stream.iter().map(|(id, _)| id.parse().unwrap()).collect();
    assert_eq!(places, (1..=stream.len()).collect::<Vec<_>>(), "oldest first, without gaps");
    let ids: Vec<&str> = stream.iter().map(|(_, event)| event["id"].as_str().unwrap()).collect();
    for limit in [2, 100] {
        let mut newest_first = walk(&client, &format!("/v1/fine_tuning/jobs/{id}/events"), limit).await;
        newest_first.reverse();
        assert_eq!(newest_first, ids);
    }
    let rest = client.events(id, Some(&stream[1].0)).await;
    assert_eq!(rest, stream[2..]);
    let steps: Vec<&Value> =
        stream.iter().filter(|(_, e)| e["type"] == "metrics").map(|(_, e)| &e["data"]["step"]).collect();
    assert_eq!(steps, [&json!(1), &json!(2)]);

    let checkpoints = walk(&client, &format!("/v1/fine_tuning/jobs/{id}/checkpoints"), 1).await;
    assert_eq!(checkpoints.len(), 2, "{checkpoints:?}");
    let result = job["result_files"][0].as_str().unwrap();
    let csv = client.get(&format!("/v1/files/{result}/content")).await.ok();
    let lines: Vec<&str> = csv.as_str().unwrap().lines().collect();
    assert_eq!(lines[0], "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy");
    assert_eq!(lines.len(), 3, "{csv}");
}

#[tokio::test]
async fn a_job_echoes_every_setting_and_can_be_repeated_from_them() {
    let server = Server::start();
    let client = server.client();
    let file = client.file(20).await;
    let asked = json!({
        "model": BASE, "training_file": file, "suffix": "echo", "seed": 7, "metadata": {"team": "a"}, "dry_run": true,
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 12.0, "target_modules": ["q_proj", "v_proj"]},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        "training": {"learning_rate": 0.003, "warmup_ratio": 0.25},
    });
    let job = client.post("/v1/fine_tuning/jobs", &asked).await.ok();
    assert_eq!(client.get("/v1/fine_tuning/jobs").await.ok()["data"], json!([]), "a dry run queues nothing");
    assert_eq!((&job["seed"], &job["metadata"]["team"]), (&json!(7), &json!("a")));
    let hyper = &job["method"]["supervised"]["hyperparameters"];
    assert_eq!((&hyper["n_epochs"], &hyper["batch_size"]), (&json!(2), &json!(1)), "{hyper}");
    assert_eq!((&job["adapter"]["r"], &job["adapter"]["lora_alpha"]), (&json!(4), &json!(12.0)));
    assert_eq!(job["training"]["max_seq_len"], 512);
    let again = json!({
        "model": BASE, "training_file": file, "seed": job["seed"], "dry_run": true,
        "adapter": job["adapter"], "training": job["training"],
    });
    let again = client.post("/v1/fine_tuning/jobs", &again).await.ok();
    for part in ["adapter", "training", "seed"] {
        assert_eq!(again[part], job[part], "{part}");
    }
}
