//! `tools` and `tool_choice`.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server};

const CHAT: &str = "/v1/chat/completions";

/// A template in the manner of Hermes, which says the tools and shows how calls are written.
const TEMPLATE: &str = "{% if tools %}Tools: {{ tools | tojson }} in <tool_call></tool_call>\n{% endif %}\
                        {% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}\
                        {% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}\
                        </tool_call>{% endfor %}<|im_end|>\n{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn tool(name: &str, strict: Value) -> Value {
    let parameters = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
                            "required": ["n"], "additionalProperties": false});
    json!({"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}})
}

fn body(extra: Value) -> Value {
    let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 120, "seed": 1,
                          "tools": [tool("first", Value::Null), tool("second", json!(true))]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn set(file: &Path, field: &str, value: Value) {
    let mut config: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    config[field] = value;
    fs::write(file, config.to_string()).unwrap();
}

/// Schemas are long in a vocabulary of bytes.
pub fn with_template() -> Server {
    Server::prepared(&[], |model| {
        set(&model.join("tokenizer_config.json"), "chat_template", json!(TEMPLATE));
        set(&model.join("config.json"), "max_position_embeddings", json!(4096));
    })
}

/// A base of so many positions.
pub fn with_context(arguments: &[&str], positions: usize) -> Server {
    Server::prepared(arguments, |model| set(&model.join("config.json"), "max_position_embeddings", json!(positions)))
}

fn n_of(call: &Value) -> u64 {
    assert!(call["id"].as_str().unwrap().starts_with("call_") && call["type"] == "function", "{call}");
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    arguments["n"].as_u64().unwrap()
}

async fn called(client: &Client, extra: Value) -> String {
    let answer = client.post(CHAT, &body(extra)).await.ok();
    let choice = &answer["choices"][0];
    let calls = choice["message"]["tool_calls"].as_array().unwrap_or_else(|| panic!("{answer}"));
    assert_eq!(
        (calls.len(), &choice["finish_reason"], &choice["message"]["content"]),
        (1, &json!("tool_calls"), &json!(""))
    );
    assert!(n_of(&calls[0]) < 10);
    calls[0]["function"]["name"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_call_that_is_asked_for_comes_with_arguments_of_its_schema() {
    let server = with_template();
    let client = server.client();
    let named = |name: &str| json!({"tool_choice": {"type": "function", "function": {"name": name}}});
    assert_eq!(called(&client, named("second")).await, "second");
    assert_eq!(called(&client, named("first")).await, "first");
    let any = called(&client, json!({"tool_choice": "required", "parallel_tool_calls": false})).await;
    assert!(["first", "second"].contains(&any.as_str()));
    let several = client.post(CHAT, &body(json!({"tool_choice": "required", "max_tokens": 300}))).await.ok();
    let calls = several["choices"][0]["message"]["tool_calls"].as_array().unwrap_or_else(|| panic!("{several}"));
    assert!(!calls.is_empty() && calls.iter().all(|call| n_of(call) < 10));
    let mut streamed = body(named("second"));
    streamed["stream"] = json!(true);
    let chunks = client.stream(CHAT, &streamed).await;
    let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
    let pieces: Vec<&Value> =
        choices.iter().filter_map(|choice| choice["delta"]["tool_calls"].as_array()).flatten().collect();
    // The first says whom it calls; the arguments come as they are written.
    let mut call = pieces[0].clone();
    assert_eq!(call["function"]["name"], "second");
    assert!(pieces.len() > 5 && pieces.iter().all(|piece| piece["index"] == 0), "{pieces:?}");
    assert!(pieces[1..].iter().all(|piece| piece["id"].is_null() && piece["function"]["name"].is_null()));
    let arguments: Vec<&str> = pieces.iter().map(|piece| piece["function"]["arguments"].as_str().unwrap()).collect();
    call["function"]["arguments"] = json!(arguments.concat());
    assert!(n_of(&call) < 10);
    assert_eq!(choices.last().unwrap()["finish_reason"], "tool_calls");
    assert!(choices.iter().all(|choice| choice["delta"]["content"].as_str().unwrap_or_default().is_empty()));
}

#[tokio::test]
async fn tools_and_earlier_calls_stand_in_the_prompt() {
    let server = with_template();
    let client = server.client();
    let tokens = async |extra: Value| {
        let mut body = body(json!({"max_tokens": 1, "tools": [tool("first", Value::Null)]}));
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        client.post(CHAT, &body).await.ok()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let without = tokens(json!({"tools": []})).await;
    assert_eq!(tokens(json!({"tool_choice": "none"})).await, without);
    assert!(tokens(json!({"tool_choice": "auto"})).await > without + 100);
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "first", "arguments": "{\"n\": 7}"}});
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]},
                          {"role": "tool", "tool_call_id": "call_1", "content": "49"}]);
    // The arguments are shown as an object: `{"n": 7}`, without escapes.
    let shown = "<|im_start|>assistant\n<tool_call>{\"n\": 7}</tool_call><|im_end|>\n<|im_start|>tool\n49<|im_end|>\n";
    let specials = 4 * ("<|im_start|>".len() + "<|im_end|>".len()) / 2 - 4;
    assert_eq!(tokens(json!({"tools": [], "messages": messages})).await, without + (shown.len() - specials) as u64);
}

#[tokio::test]
async fn tools_that_cannot_be_served_are_refused_by_name() {
    let server = with_template();
    let client = server.client();
    let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    let open = json!({"name": "f", "strict": true, "parameters": {"type": "object", "properties": {"a": {}}}});
    for (extra, code, param) in [
        (json!({"tools": [], "parallel_tool_calls": false}), "invalid_combination", "parallel_tool_calls"),
        (json!({"tools": [], "tool_choice": "required"}), "invalid_combination", "tool_choice"),
        (function(json!({"name": "no good"})), "invalid_tool", "tools.0.function.name"),
        (function(json!({"name": "f", "extra": 1})), "unknown_parameter", "tools.0.function.extra"),
        (function(json!({"name": "f", "parameters": []})), "invalid_tool", "tools.0.function.parameters"),
        (function(open), "invalid_json_schema", "tools.0.function.parameters"),
        (json!({"tools": [{"type": "custom"}]}), "invalid_tool", "tools.0.type"),
        (
            json!({"tool_choice": {"type": "function", "function": {"name": "third"}}}),
            "unknown_function",
            "tool_choice.function.name",
        ),
        (
            json!({"tool_choice": "required", "response_format": {"type": "json_object"}}),
            "invalid_combination",
            "response_format",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "1"}], "tools": []}),
            "invalid_message",
            "messages.0.tool_call_id",
        ),
    ] {
        client.post(CHAT, &body(extra)).await.error(400, code, Some(param));
    }
    let plain = Server::start();
    let said = json!({"role": "tool", "tool_call_id": "call_1", "content": "1"});
    plain.client().post(CHAT, &body(json!({"tools": [], "messages": [said]}))).await.error(
        400,
        "tools_unsupported",
        Some("messages.0"),
    );
    plain.client().post(CHAT, &body(json!({"tools": [tool("f", Value::Null)]}))).await.error(
        400,
        "tools_unsupported",
        Some("tools"),
    );
}
