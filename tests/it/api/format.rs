//! `response_format`.

use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server};

const CHAT: &str = "/v1/chat/completions";

fn body(format: Value) -> Value {
    json!({"model": BASE, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "seed": 3,
           "response_format": format})
}

fn named(schema: Value, strict: Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": strict}})
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[tokio::test]
async fn answers_keep_to_their_format() {
    let server = Server::start();
    let client = server.client();
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
                        "required": ["n"], "additionalProperties": false});
    for strict in [json!(true), json!(false), Value::Null] {
        let answer = client.post(CHAT, &body(named(schema.clone(), strict))).await.ok();
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        let value: Value = serde_json::from_str(content(&answer)).unwrap();
        assert!(value["n"].as_u64().is_some_and(|n| n < 100), "{answer}");
    }
    let mut streamed = body(named(schema, json!(true)));
    streamed["stream"] = json!(true);
    let chunks = client.stream(CHAT, &streamed).await;
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert!(serde_json::from_str::<Value>(&text).is_ok(), "{text}");
    let object = client.post(CHAT, &body(json!({"type": "json_object"}))).await.ok();
    assert!(content(&object).starts_with('{'), "{object}");
    let text = client.post(CHAT, &body(json!({"type": "text"}))).await.ok();
    assert!(!content(&text).starts_with('{'), "{text}");
}

#[tokio::test]
async fn formats_that_cannot_be_kept_are_refused_by_name() {
    let server = Server::start();
    let client: Client = server.client();
    let schema = "response_format.json_schema.schema";
    let open = json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]});
    let optional = json!({"type": "object", "properties": {"a": {}}, "required": [], "additionalProperties": false});
    let inner = json!({"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, open]}},
                       "required": ["a"], "additionalProperties": false});
    for (format, code, param) in [
        (
            named(json!({"type": "object", "unevaluatedItems": 1}), json!(false)),
            "invalid_json_schema",
            schema.to_owned(),
        ),
        (named(open, json!(true)), "invalid_json_schema", schema.to_owned()),
        (named(optional, json!(true)), "invalid_json_schema", schema.to_owned()),
        (named(inner, json!(true)), "invalid_json_schema", format!("{schema}.properties.a.anyOf.1")),
        (
            json!({"type": "json_schema", "json_schema": {"name": "no good"}}),
            "invalid_name",
            "response_format.json_schema.name".to_owned(),
        ),
        (json!({"type": "xml"}), "invalid_type", "response_format.type".to_owned()),
        (json!({"type": "json_object", "strict": true}), "unknown_parameter", "response_format.strict".to_owned()),
    ] {
        client.post(CHAT, &body(format)).await.error(400, code, Some(&param));
    }
}
