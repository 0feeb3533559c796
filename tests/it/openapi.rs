//! The OpenAPI document: committed as the code makes it, and complete enough for generators.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::Value;

fn document() -> Value {
    serde_json::to_value(attune::api::document()).unwrap()
}

/// `(path, method, operation)` of every route.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut all = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            all.push((path.clone(), method.clone(), operation.clone()));
        }
    }
    all
}

#[test]
fn the_committed_document_is_the_one_that_the_code_makes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/openapi.json");
    let committed = fs::read_to_string(path).unwrap_or_default();
    let made = attune::api::document().to_pretty_json().unwrap() + "\n";
    assert!(committed == made, "openapi/openapi.json is stale: run `cargo run --release -- openapi`");
}

#[test]
fn every_operation_has_what_generators_need() {
    let document = document();
    assert_eq!(document["info"]["license"]["identifier"], "Apache-2.0");
    let mut ids = BTreeSet::new();
    for (path, method, operation) in operations(&document) {
        let id = operation["operationId"].as_str().unwrap_or_default().to_owned();
        assert!(!id.is_empty() && ids.insert(id.clone()), "{method} {path} has no operation id of its own: {id:?}");
        assert!(operation["tags"][0].is_string(), "{method} {path} has no tag");
        for (status, response) in operation["responses"].as_object().unwrap() {
            let description = response["description"].as_str().unwrap_or_default();
            assert!(!description.is_empty(), "{method} {path} {status} has no description");
        }
        for (name, _) in path.match_indices('{').map(|(at, _)| path[at + 1..].split_once('}').unwrap()) {
            let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
            let found = parameters.iter().any(|p| p["name"] == name && p["in"] == "path" && p["required"] == true);
            assert!(found, "{method} {path} does not describe {{{name}}}");
        }
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn walk<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str));
                fields.values().for_each(|value| walk(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| walk(value, found)),
            _ => {}
        }
    }
    let document = document();
    let mut references = Vec::new();
    walk(&document, &mut references);
    assert!(references.len() > 50, "only {} references", references.len());
    for reference in references {
        let pointer = reference.strip_prefix('#').unwrap_or_default();
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
}

#[test]
fn every_route_below_v1_needs_a_key_and_says_so() {
    for (path, method, operation) in operations(&document()) {
        let responses = operation["responses"].as_object().unwrap();
        assert_eq!(path.starts_with("/v1/"), responses.contains_key("401"), "{method} {path}");
        let is_open = operation["security"].as_array().is_some_and(|s| s.iter().all(|s| *s == serde_json::json!({})));
        assert_eq!(!path.starts_with("/v1/"), is_open, "{method} {path}");
    }
}
