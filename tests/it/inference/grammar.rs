//! Completions that keep to a schema, whatever the weights say.

use attune::{
    inference::{EngineError, Finish, Request, Sampling},
    text::Grammar,
};
use serde_json::{Value, json};

use super::{Bench, ask, run, settings};

fn grammar(bench: &Bench, schema: &Value) -> Grammar {
    bench.bases.get("dense").unwrap().text.grammars().unwrap().json(schema).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn random_weights_write_what_the_schema_says() {
    let bench = Bench::start(settings()).await;
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["kind", "sizes"],
        "properties": {
            "kind": {"enum": ["smäll", "large"]},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 40}, "maxItems": 3},
            "note": {"type": "string", "maxLength": 4},
        },
    });
    let adapter = bench.several(1).await.remove(0);
    let mut different = std::collections::BTreeSet::new();
    for seed in 0..12 {
        let sampling = Sampling { seed, ignore_eos: seed % 2 == 0, ..Sampling::default() };
        let grammar = Some(grammar(&bench, &schema));
        let adapter = Some(&adapter).filter(|_| seed % 3 == 0);
        let answer = run(&bench.engine, Request { sampling, grammar, ..ask(adapter, 7, 300) }).await.ok();
        assert_eq!(answer.end, Some(Ok(Finish::Stop)));
        let ids: Vec<u32> = answer.tokens.iter().map(|(id, _)| *id).collect();
        let text = bench.bases.get("dense").unwrap().text.tokenizer.decode(&ids, false).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let fields = value.as_object().unwrap();
        assert!(fields.keys().all(|key| ["kind", "sizes", "note"].contains(&key.as_str())), "{text}");
        assert!(["smäll", "large"].contains(&value["kind"].as_str().unwrap()), "{text}");
        let sizes = value["sizes"].as_array().unwrap();
        assert!(sizes.len() <= 3 && sizes.iter().all(|n| (-5..=40).contains(&n.as_i64().unwrap())), "{text}");
        assert!(value["note"].as_str().is_none_or(|note| note.chars().count() <= 4), "{text}");
        different.insert(text);
    }
    assert!(different.len() > 6, "{different:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_keeps_to_a_format_is_batched_with_who_does_not() {
    let bench = Bench::start(settings()).await;
    let schema = json!({"type": "array", "items": {"type": "boolean"}, "minItems": 30, "maxItems": 30});
    let held = Request { grammar: Some(grammar(&bench, &schema)), ..ask(None, 9, 250) };
    let alone = (run(&bench.engine, held.clone()).await.ok(), run(&bench.engine, ask(None, 5, 40)).await.ok());
    let (first, second) = tokio::join!(run(&bench.engine, held), run(&bench.engine, ask(None, 5, 40)));
    assert_eq!((first, second), alone);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_cannot_be_kept_is_an_error() {
    let bench = Bench::start(settings()).await;
    let grammars = bench.bases.get("dense").unwrap().text.grammars().unwrap();
    for (schema, word) in [
        (json!({"type": "object", "unevaluatedProperties": false}), "unevaluatedProperties"),
        (json!({"$ref": "https://example.com/schema"}), "ref"),
        (json!({"type": "whole"}), "type"),
        (json!({"x-guidance": {"lenient": true}, "type": "object"}), "x-guidance"),
        (json!([1]), "object"),
        (json!({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    ] {
        let error = grammars.json(&schema).err().unwrap_or_else(|| panic!("{schema} was taken")).to_string();
        assert!(error.contains(word), "{schema}: {error}");
    }
    assert_eq!(EngineError::Grammar("x".into()).to_string(), "the completion cannot keep to its format: x");
}
