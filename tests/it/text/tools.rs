//! Answers that are held to calls, token by token.

use attune::text::{Calls, Text, ToolStyle};
use serde_json::{Value, json};

use super::{smollm2, tiny};

fn functions() -> [(String, Value); 2] {
    // The reference stands inside the function's own schema.
    let first = json!({"type": "object", "properties": {"n": {"$ref": "#/$defs/digit"}}, "required": ["n"],
                       "additionalProperties": false, "$defs": {"digit": {"enum": [1, 2]}}});
    [("first".to_owned(), first), ("second".to_owned(), json!({"type": "object"}))]
}

/// Whether each token of the text may follow those before it, and whether the text may then end.
fn fits(text: &Text, style: ToolStyle, calls: Calls, said: &str) -> Option<bool> {
    let mut grammar = text.grammars().unwrap().calls(style, calls, &functions()).unwrap();
    let may = |grammar: &mut attune::text::Grammar, id: u32| {
        let mut scores = vec![0.0; text.tokenizer.vocab_size];
        grammar.mask(&mut scores).is_ok() && scores[id as usize] == 0.0
    };
    for id in text.tokenizer.encode(said, false).unwrap() {
        if !may(&mut grammar, id) {
            return None;
        }
        grammar.take(id).unwrap();
    }
    Some(grammar.is_complete() || may(&mut grammar, text.stop_ids[0]))
}

const FIRST: &str = "<tool_call>\n{\"name\": \"first\", \"arguments\": {\"n\": 2}}\n</tool_call>";
const SECOND: &str = "<tool_call>\n{\"name\": \"second\", \"arguments\": {\"a\": [1]}}\n</tool_call>";

#[test]
fn answers_hold_as_many_calls_as_they_may() {
    let (two, talk) = (format!("{FIRST}\n{SECOND}"), format!("I\nsee <b>. {FIRST}"));
    let cases: [(&str, [Option<bool>; 4]); 8] = [
        // One, Several, AtMostOne, Any.
        (FIRST, [Some(true); 4]),
        (SECOND, [Some(true); 4]),
        (&two, [None, Some(true), None, Some(true)]),
        (&talk, [None, None, Some(true), Some(true)]),
        ("Only words {}", [None, None, Some(true), Some(true)]),
        ("", [Some(false), Some(false), Some(true), Some(true)]),
        ("<tool_call>\n{\"name\": \"first\", \"arguments\": {\"n\": 3", [None; 4]),
        ("<tool_call>\n{\"name\": \"third\"", [None; 4]),
    ];
    for text in [tiny(), smollm2()] {
        for (said, expected) in &cases {
            let found = [Calls::One, Calls::Several, Calls::AtMostOne, Calls::Any]
                .map(|calls| fits(text, ToolStyle::Tagged, calls, said));
            assert_eq!(found, *expected, "{said}");
        }
    }
}

#[test]
fn bare_calls_are_the_whole_answer() {
    let call = r#"{"name": "first", "parameters": {"n": 1}}"#;
    for (said, forced, free) in [
        (call, Some(true), Some(true)),
        ("Only words {", None, Some(true)),
        (r#"{"name": "first", "parameters": {"n": 5"#, None, None),
        ("{}", None, None),
    ] {
        assert_eq!(fits(tiny(), ToolStyle::Bare, Calls::One, said), forced, "{said}");
        assert_eq!(fits(tiny(), ToolStyle::Bare, Calls::Any, said), free, "{said}");
    }
}

#[test]
fn templates_show_how_calls_are_written() {
    assert_eq!(ToolStyle::of_template("… <tool_call></tool_call> …"), Some(ToolStyle::Tagged));
    let llama = r#"{"name": function name, "parameters": dictionary of argument name and its value}"#;
    assert_eq!(ToolStyle::of_template(llama), Some(ToolStyle::Bare));
    assert_eq!(ToolStyle::of_template("{{ tools }}"), None);
    assert!(!smollm2().template.as_ref().unwrap().takes_tools());
}
