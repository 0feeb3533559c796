//! Who may call what. The routes come from the OpenAPI document, so that a new one is covered when it appears.

use reqwest::{Method, multipart};
use serde_json::{Value, json};

use crate::support::server::{Answer, Client, Server, answer};

/// Every route below `/v1`, with its path's placeholders.
async fn routes(client: &Client) -> Vec<(Method, String)> {
    let document = answer(client.anonymous(Method::GET, "/openapi.json")).await.ok();
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap().iter().filter(|(path, _)| path.starts_with("/v1/")) {
        for method in item.as_object().unwrap().keys() {
            routes.push((method.to_uppercase().parse().unwrap(), path.clone()));
        }
    }
    assert!(routes.len() >= 20, "{routes:?}");
    routes
}

/// What each kind of key reaches, decided here once more and not read from the code.
fn may(scope: &str, method: &Method, path: &str) -> bool {
    let says = path == "/v1/feedback" && *method == Method::POST;
    let is_text = says || path.ends_with("/completions") || ["/v1/embeddings", "/v1/classify"].contains(&path);
    let is_batches = path.starts_with("/v1/batches");
    let is_text = is_text || is_batches && *method == Method::POST;
    let is_aliases = path.starts_with("/v1/aliases");
    let is_models = (path.starts_with("/v1/models") || is_batches || is_aliases) && *method == Method::GET;
    match scope {
        "all" => true,
        "inference" => is_text || is_models,
        "training" => !is_text,
        "read" => *method == Method::GET,
        other => panic!("{other}"),
    }
}

async fn call(client: &Client, method: &Method, path: &str) -> Answer {
    let request = client.request(method.clone(), path);
    // Routes that look at the body before they look for the id.
    let request = match path.rsplit('/').next() {
        Some("parts") => {
            let data = multipart::Part::bytes(b"{}".to_vec()).file_name("part");
            request.multipart(multipart::Form::new().part("data", data))
        }
        Some("complete") => request.json(&json!({"part_ids": ["part_none"]})),
        _ if *method == Method::PUT => request.json(&json!({"model": "ft:none"})),
        _ => request,
    };
    answer(request).await
}

#[tokio::test]
async fn without_a_valid_key_no_route_answers() {
    let server = Server::start();
    let client = server.client();
    let wrong = server.client_with("wrong-key-of-twenty-letters");
    let almost = server.client_with(&crate::support::server::KEY[1..]);
    for (method, path) in routes(&client).await {
        let message = answer(client.anonymous(method.clone(), &path)).await.error(401, "invalid_api_key", None);
        assert!(message.contains("Authorization: Bearer"), "{message}");
        for client in [&wrong, &almost] {
            call(client, &method, &path).await.error(401, "invalid_api_key", None);
        }
        let basic = client.anonymous(method.clone(), &path).header("authorization", "Basic dGVzdDp0ZXN0");
        answer(basic).await.error(401, "invalid_api_key", None);
    }
    for path in ["/livez", "/readyz", "/openapi.json"] {
        answer(client.anonymous(Method::GET, path)).await.ok();
    }
}

#[tokio::test]
async fn a_key_reaches_what_its_scopes_say() {
    let server = Server::start();
    let routes = routes(&server.client()).await;
    for scope in ["all", "inference", "training", "read"] {
        let client = server.client_with(&server.create_key("p", scope));
        for (method, path) in &routes {
            let answer = call(&client, method, path).await;
            assert_ne!(answer.status, 401, "{scope}: {method} {path}");
            // Bodies are missing and ids unknown, so whoever comes through gets another error or an empty list.
            assert_eq!(answer.status != 403, may(scope, method, path), "{scope}: {method} {path}: {}", answer.body);
            if answer.status == 403 {
                answer.error(403, "insufficient_scope", None);
            }
        }
    }
    let both = server.client_with(&server.create_key("p", "inference,read"));
    assert_eq!(both.get("/v1/files").await.status, 200);
    both.post("/v1/fine_tuning/jobs", &json!({})).await.error(403, "insufficient_scope", None);
}

#[tokio::test]
async fn foreign_ids_answer_like_unknown_ones() {
    let server = Server::start();
    let (mine, other) = (server.client(), server.client_with(&server.create_key("other", "all")));
    let file = mine.file(4).await;
    let job = mine.trained(&file).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    let model = job["fine_tuned_model"].as_str().unwrap();
    let adapters = mine.get("/v1/adapters").await.ok();
    let adapter = adapters["data"][0]["id"].as_str().unwrap();
    let kept =
        json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "store": true});
    let completion = mine.post("/v1/chat/completions", &kept).await.ok()["id"].clone();
    let feedback = mine.post("/v1/feedback", &json!({"completion_id": completion, "thumb": "up"})).await.ok();
    let upload = json!({"filename": "rows.jsonl", "purpose": "fine-tune", "bytes": 9, "mime_type": "text/jsonl"});
    let upload = mine.post("/v1/uploads", &upload).await.ok();
    let form = multipart::Form::new()
        .text("purpose", "batch")
        .part("file", multipart::Part::bytes(b"{}".to_vec()).file_name("b"));
    let requests = answer(mine.request(Method::POST, "/v1/files").multipart(form)).await.ok();
    let batch = json!({"input_file_id": requests["id"], "endpoint": "/v1/completions", "completion_window": "24h"});
    let batch = mine.post("/v1/batches", &batch).await.ok();
    let prompts = "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]}\n";
    let prompts = mine.upload(prompts).await.ok()["id"].clone();
    let judge = json!({"type": "grader", "grader": {"type": "json_valid", "name": "j", "input": "a"}});
    let body = json!({"file": prompts, "model": "tiny", "judge": judge});
    let preferences = mine.post("/v1/preferences", &body).await.ok();
    let named = mine.request(Method::PUT, "/v1/aliases/an-alias-of-mine").json(&json!({"model": model}));
    answer(named).await.ok();
    let fill = |path: &str, unknown: bool| {
        let id = |known: &str| if unknown { format!("{}x", &known[..known.len() - 1]) } else { known.to_owned() };
        path.replace("{file_id}", &id(&file))
            .replace("{job_id}", &id(job["id"].as_str().unwrap()))
            .replace("{model}", &id(model))
            .replace("{adapter_id}", &id(adapter))
            .replace("{completion_id}", &id(completion.as_str().unwrap()))
            .replace("{feedback_id}", &id(feedback["id"].as_str().unwrap()))
            .replace("{alias}", &id("an-alias-of-mine"))
            .replace("{batch_id}", &id(batch["id"].as_str().unwrap()))
            .replace("{preferences_id}", &id(preferences["id"].as_str().unwrap()))
            .replace("{upload_id}", &id(upload["id"].as_str().unwrap()))
    };
    let mut tried = 0;
    for (method, path) in routes(&mine).await.iter().filter(|(_, path)| path.contains('{')) {
        let (foreign, unknown) = (fill(path, false), fill(path, true));
        assert!(!foreign.contains('{'), "{foreign}: this test does not know the placeholder");
        let (a, b) = (call(&other, method, &foreign).await, call(&other, method, &unknown).await);
        assert_eq!((a.status, b.status), (404, 404), "{method} {path}: {} {}", a.body, b.body);
        let shape = |answer: &Answer, path: &str| {
            let message = answer.body["error"]["message"].as_str().unwrap().to_owned();
            let id = path.split('/').find(|part| part.len() > 12).unwrap();
            (message.replace(id, "ID"), answer.body["error"]["code"].clone(), answer.body["error"]["param"].clone())
        };
        assert_eq!(shape(&a, &foreign), shape(&b, &unknown), "{method} {path}");
        tried += 1;
    }
    assert!(tried >= 12, "{tried}");
    // Ids inside bodies, and as the mark of a page.
    let body = json!({"model": "tiny", "training_file": file});
    other.post("/v1/fine_tuning/jobs", &body).await.error(404, "not_found", Some("training_file"));
    let chat = json!({"model": model, "messages": [{"role": "user", "content": "Hi"}]});
    other.post("/v1/chat/completions", &chat).await.error(404, "model_not_found", Some("model"));
    assert_eq!(other.get(&format!("/v1/files?after={file}")).await.status, 404);
    for (path, id) in [("files", &file), ("fine_tuning/jobs", &job["id"].as_str().unwrap().to_owned())] {
        assert_eq!(other.get(&format!("/v1/{path}")).await.ok()["data"], json!([]));
        // The owner's are all still there.
        assert_eq!(mine.get(&format!("/v1/{path}/{id}")).await.ok()["id"], id.as_str());
    }
    let shown: Value = other.get("/v1/models").await.ok();
    assert_eq!(shown["data"].as_array().unwrap().len(), 1, "{shown}");
}
