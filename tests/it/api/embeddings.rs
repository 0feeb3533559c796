//! `/v1/embeddings`.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server};

const PATH: &str = "/v1/embeddings";

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn length(vector: &[f32]) -> f32 {
    vector.iter().map(|x| x * x).sum::<f32>().sqrt()
}

async fn vector(client: &Client, extra: Value) -> Vec<f32> {
    let mut body = json!({"model": BASE, "input": "a text"});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    numbers(&client.post(PATH, &body).await.ok()["data"][0]["embedding"])
}

#[tokio::test]
async fn vectors_have_length_one_and_come_as_asked() {
    let server = Server::start();
    let client = server.client();
    let plain = vector(&client, json!({})).await;
    assert_eq!(plain.len(), 64);
    assert!((length(&plain) - 1.0).abs() < 1e-5);
    assert_ne!(vector(&client, json!({"pooling": "last"})).await, plain);
    assert_ne!(vector(&client, json!({"input": "a test"})).await, plain);
    assert_eq!(vector(&client, json!({"pooling": "mean", "encoding_format": "float"})).await, plain);
    let short = vector(&client, json!({"dimensions": 10})).await;
    assert_eq!(short.len(), 10);
    for (short, x) in short.iter().zip(&plain) {
        assert!((short * length(&plain[..10]) - x).abs() < 1e-5);
    }
    let encoded = client.post(PATH, &json!({"model": BASE, "input": "a text", "encoding_format": "base64"})).await.ok();
    let bytes = STANDARD.decode(encoded["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let decoded: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert_eq!(decoded, plain);
}

#[tokio::test]
async fn inputs_are_texts_or_ids_one_or_many_and_are_counted() {
    let server = Server::start();
    let client = server.client();
    let found = client.post(PATH, &json!({"model": BASE, "input": ["a text", "b"]})).await.ok();
    assert_eq!((&found["object"], &found["model"]), (&json!("list"), &json!(BASE)));
    assert_eq!(found["usage"], json!({"prompt_tokens": 7, "total_tokens": 7}));
    let ids: Vec<u32> = "a text".bytes().map(u32::from).collect();
    let by_ids = client.post(PATH, &json!({"model": BASE, "input": [[98], ids]})).await.ok();
    for (i, j) in [(0, 1), (1, 0)] {
        assert_eq!(found["data"][i]["embedding"], by_ids["data"][j]["embedding"]);
        assert_eq!((&found["data"][i]["index"], &found["data"][i]["object"]), (&json!(i), &json!("embedding")));
    }
}

#[tokio::test]
async fn what_cannot_be_embedded_says_why() {
    let server = Server::start();
    let client = server.client();
    for (body, status, code, param) in [
        (json!({"input": "x"}), 400, "missing_required_parameter", "model"),
        (json!({"model": "none", "input": "x"}), 404, "model_not_found", "model"),
        (json!({"model": BASE, "input": ""}), 400, "empty_prompt", "input"),
        (json!({"model": BASE, "input": []}), 400, "empty_prompt", "input"),
        (json!({"model": BASE, "input": vec!["x"; 257]}), 400, "out_of_range", "input"),
        (json!({"model": BASE, "input": [[1, 9999]]}), 400, "out_of_range", "input"),
        (json!({"model": BASE, "input": "x".repeat(600)}), 400, "context_length_exceeded", "input"),
        (json!({"model": BASE, "input": "x", "dimensions": 65}), 400, "out_of_range", "dimensions"),
        (json!({"model": BASE, "input": "x", "dimensions": 0}), 400, "out_of_range", "dimensions"),
        (json!({"model": BASE, "input": "x", "encoding_format": "hex"}), 400, "invalid_type", "encoding_format"),
        (json!({"model": BASE, "input": "x", "user": "me"}), 400, "unsupported_parameter", "user"),
        (json!({"model": BASE, "input": "x", "sum": 1}), 400, "unknown_parameter", "sum"),
    ] {
        client.post(PATH, &body).await.error(status, code, Some(param));
    }
}
