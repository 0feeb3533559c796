//! Files in parts.

use reqwest::{Method, multipart};
use serde_json::{Value, json};

use crate::support::server::{Answer, BASE, Client, Server, answer, chat_rows};

const UPLOADS: &str = "/v1/uploads";

async fn begin(client: &Client, bytes: usize) -> String {
    let body = json!({"filename": "rows.jsonl", "purpose": "fine-tune", "bytes": bytes, "mime_type": "text/jsonl"});
    let upload = client.post(UPLOADS, &body).await.ok();
    assert_eq!((&upload["status"], &upload["file"]), (&json!("pending"), &Value::Null));
    upload["id"].as_str().unwrap().to_owned()
}

async fn part(client: &Client, upload: &str, bytes: &[u8]) -> Answer {
    let data = multipart::Part::bytes(bytes.to_vec()).file_name("part");
    let form = multipart::Form::new().part("data", data);
    answer(client.request(Method::POST, &format!("{UPLOADS}/{upload}/parts")).multipart(form)).await
}

async fn complete(client: &Client, upload: &str, body: Value) -> Answer {
    client.post(&format!("{UPLOADS}/{upload}/complete"), &body).await
}

/// What is left of parts in the store.
fn stored_parts(server: &Server) -> usize {
    let folder = server.data().join("blobs/uploads");
    let uploads = std::fs::read_dir(folder).into_iter().flatten();
    uploads.flat_map(|upload| std::fs::read_dir(upload.unwrap().path()).unwrap()).count()
}

#[tokio::test]
async fn parts_become_a_file_in_the_order_that_is_asked_for() {
    let server = Server::start();
    let client = server.client();
    let rows = chat_rows(9).into_bytes();
    let (first, rest) = rows.split_at(77);
    let (second, third) = rest.split_at(201);
    let upload = begin(&client, rows.len()).await;
    let mut ids = Vec::new();
    for piece in [third, first, second] {
        let made = part(&client, &upload, piece).await.ok();
        assert_eq!((&made["object"], &made["upload_id"]), (&json!("upload.part"), &json!(upload)));
        ids.push(made["id"].clone());
    }
    let order = json!([ids[1], ids[2], ids[0]]);
    complete(&client, &upload, json!({"part_ids": order, "md5": "0".repeat(32)})).await.error(
        400,
        "wrong_hash",
        Some("md5"),
    );
    assert_eq!(client.get("/v1/files").await.ok()["data"], json!([]), "nothing is left of what was wrong");
    let md5 = hex::encode(<md5::Md5 as md5::Digest>::digest(&rows));
    let done = complete(&client, &upload, json!({"part_ids": order, "md5": md5})).await.ok();
    assert_eq!((&done["status"], &done["file"]["bytes"]), (&json!("completed"), &json!(rows.len())));
    let file = done["file"]["id"].as_str().unwrap();
    let content = client.get(&format!("/v1/files/{file}/content")).await.ok();
    assert_eq!(content, json!(String::from_utf8(rows).unwrap()));
    assert_eq!(stored_parts(&server), 0);
    let body = json!({"model": BASE, "training_file": file, "training": {"max_steps": 1}, "dry_run": true});
    client.post("/v1/fine_tuning/jobs", &body).await.ok();

    let ended = Some("id");
    complete(&client, &upload, json!({"part_ids": order})).await.error(400, "invalid_upload_state", ended);
    part(&client, &upload, b"x").await.error(400, "invalid_upload_state", ended);
    client.post(&format!("{UPLOADS}/{upload}/cancel"), &json!({})).await.error(400, "invalid_upload_state", ended);
}

#[tokio::test]
async fn uploads_that_cannot_become_a_file_are_refused_by_field() {
    let server = Server::with(&["--max-upload", "1000"]);
    let client = server.client();
    for (change, code, param) in [
        (json!({"bytes": 0}), "out_of_range", "bytes"),
        (json!({"bytes": 1001}), "out_of_range", "bytes"),
        (json!({"bytes": 1.5}), "invalid_type", "bytes"),
        (json!({"purpose": "fun"}), "invalid_purpose", "purpose"),
        (json!({"filename": ""}), "invalid_filename", "filename"),
        (json!({"mime_type": null}), "missing_required_parameter", "mime_type"),
        (json!({"expires_after": {"seconds": 9}}), "unsupported_parameter", "expires_after"),
        (json!({"status": "completed"}), "unknown_parameter", "status"),
    ] {
        let mut body = json!({"filename": "a", "purpose": "fine-tune", "bytes": 5, "mime_type": "text/jsonl"});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        client.post(UPLOADS, &body).await.error(400, code, Some(param));
    }
    let upload = begin(&client, 10).await;
    let one = part(&client, &upload, b"12345").await.ok()["id"].clone();
    part(&client, &upload, b"123456").await.error(400, "invalid_upload_state", Some("data"));
    part(&client, &upload, b"").await.error(400, "empty_file", Some("data"));
    let none = complete(&client, &upload, json!({"part_ids": []})).await;
    none.error(400, "out_of_range", Some("part_ids"));
    complete(&client, &upload, json!({"part_ids": [one]})).await.error(400, "wrong_size", Some("part_ids"));
    complete(&client, &upload, json!({"part_ids": [one, one]})).await.error(400, "given_twice", Some("part_ids.1"));
    complete(&client, &upload, json!({"part_ids": ["part_x"]})).await.error(400, "not_found", Some("part_ids.0"));

    let stranger = server.client_with(&server.create_key("other", "all"));
    part(&stranger, &upload, b"1").await.error(404, "not_found", Some("id"));
    complete(&stranger, &upload, json!({"part_ids": [one]})).await.error(404, "not_found", Some("id"));
    stranger.post(&format!("{UPLOADS}/{upload}/cancel"), &json!({})).await.error(404, "not_found", Some("id"));
    assert_eq!(stored_parts(&server), 1, "what was refused is not kept");
    let cancelled = client.post(&format!("{UPLOADS}/{upload}/cancel"), &json!({})).await.ok();
    assert_eq!(cancelled["status"], "cancelled");
    assert_eq!(stored_parts(&server), 0);
}
