//! Rows of preferences: three spellings of pairs, thumbs, and what is wrong with them.

use attune::data::{Row, load};
use serde_json::{Value, json};

use super::*;

fn first(row: &Value) -> Row {
    load(row.to_string().as_bytes(), &context(&text())).unwrap().remove(0)
}

/// A row that is fine, then a bad one.
fn check(good: &Value, bad: &Value, code: &str, part: &str) {
    let report = report(format!("{good}\n{bad}"));
    assert_eq!(errors(&report), [(2, code)], "{bad}");
    assert!(report.errors[0].message.contains(part), "{bad}: {}", report.errors[0].message);
    let structure = attune::data::check_structure(format!("{good}\n{bad}").as_bytes()).unwrap();
    assert_eq!(errors(&structure), [(2, code)], "{bad}");
}

fn openai(preferred: &str, other: &str, a: Value, b: Value) -> Value {
    json!({"input": {"messages": [{"role": "user", "content": "hi"}], "tools": [], "parallel_tool_calls": true},
           preferred: a, other: b})
}

fn says(text: &str) -> Value {
    json!([{"role": "assistant", "content": text}])
}

#[test]
fn every_spelling_of_a_pair_is_the_same_pair() {
    let row = first(&openai("preferred_output", "non_preferred_output", says("good"), says("no")));
    let Row::Pair(pair) = &row else { panic!("{row:?}") };
    let trained = |example: &Example| -> Vec<u8> {
        example.labels.iter().flatten().map(|id| u8::try_from(*id).unwrap_or(b'$')).collect()
    };
    assert_eq!((trained(&pair.chosen), trained(&pair.rejected)), (b"good$".to_vec(), b"no$".to_vec()));
    assert_eq!(pair.margin, 0.0);
    let user = json!([{"role": "user", "content": "hi"}]);
    let whole = |text: &str| json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]);
    for other in [
        openai("preferred_completion", "non_preferred_completion", says("good"), says("no")),
        json!({"prompt": user, "chosen": says("good"), "rejected": says("no")}),
        json!({"chosen": whole("good"), "rejected": whole("no")}),
    ] {
        assert_eq!(first(&other), row, "{other}");
    }
    let plain = first(&json!({"prompt": "ab", "chosen": "c", "rejected": "de", "margin": 1.5}));
    let Row::Pair(pair) = &plain else { panic!("{plain:?}") };
    assert_eq!((trained(&pair.chosen), trained(&pair.rejected)), (b"c$".to_vec(), b"de$".to_vec()));
    assert_eq!((pair.margin, plain.tokens(), plain.trained(), plain.longest()), (1.5, 9, 5, 5));
}

/// Earlier answers belong to the prompt, whoever wrote the conversation.
#[test]
fn only_what_differs_is_compared() {
    let turns = |last: &str| {
        json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
               {"role": "user", "content": "c"}, {"role": "assistant", "content": last}])
    };
    let row = first(&json!({"chosen": turns("d"), "rejected": turns("e")}));
    let starts: Vec<usize> = row.examples().map(|text| text.labels.iter().position(Option::is_some).unwrap()).collect();
    assert_eq!(starts[0], starts[1]);
    assert_eq!(row.examples().map(Example::trained).collect::<Vec<_>>(), [2, 2]);
}

#[test]
fn thumbs_are_read() {
    let up = first(&json!({"prompt": "ab", "completion": "c", "label": true}));
    let down = first(&json!({"prompt": [{"role": "user", "content": "a"}], "completion": says("c"), "label": false}));
    let is_desirable = |row: &Row| match row {
        Row::Judged(judged) => judged.is_desirable,
        other => panic!("{other:?}"),
    };
    assert!(is_desirable(&up) && !is_desirable(&down));
    assert_eq!((up.trained(), down.trained()), (2, 2));
}

#[test]
fn bad_rows_are_named_by_line() {
    let two = |a: Value, b: Value| openai("preferred_output", "non_preferred_output", a, b);
    let good = two(says("a"), says("b"));
    check(&good, &two(says("a"), says("a")), "equal_sides", "`preferred_output` and `non_preferred_output`");
    check(&good, &two(says(" "), says("b")), "empty_content", "`preferred_output`: message 1");
    check(&good, &two(says("a"), json!([])), "empty_content", "`non_preferred_output`");
    check(&good, &two(says("a"), Value::Null), "missing_field", "`non_preferred_output`");
    check(&good, &two(says("a"), json!("b")), "invalid_type", "`non_preferred_output` must be an array of messages");
    check(&good, &two(json!([{"role": "user", "content": "b"}]), says("a")), "missing_assistant", "preferred_output");
    let mut unknown = good.clone();
    unknown["mood"] = json!(1);
    check(&good, &unknown, "unknown_field", "mood");
    let mut unknown = good.clone();
    unknown["input"]["mood"] = json!(1);
    check(&good, &unknown, "unknown_field", "`input` has an unknown field `mood`");
    let mut without = good.clone();
    without["input"] = Value::Null;
    check(&good, &without, "invalid_type", "`input`");

    let plain = |chosen: Value, rejected: Value| json!({"prompt": "a", "chosen": chosen, "rejected": rejected});
    let good = plain(json!("b"), json!("c"));
    check(&good, &plain(json!("b"), json!("b")), "equal_sides", "`chosen` and `rejected`");
    check(&good, &plain(json!(""), json!("b")), "empty_content", "`chosen`");
    check(&good, &plain(json!("b"), says("c")), "invalid_type", "`rejected` must be a string");
    check(&good, &json!({"prompt": "a", "chosen": "b"}), "missing_field", "`rejected`");
    check(&good, &json!({"chosen": "b", "rejected": "c"}), "missing_field", "`prompt`");
    let margin = json!({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"});
    check(&good, &margin, "invalid_margin", "`margin`");

    let good = json!({"prompt": "a", "completion": "b", "label": true});
    check(&good, &json!({"prompt": "a", "completion": "b"}), "mixed_formats", "prompt_completion");
    check(&good, &json!({"prompt": "a", "completion": "b", "label": null}), "missing_field", "`label`");
    check(&good, &json!({"prompt": "a", "completion": "b", "label": 1}), "invalid_label", "`label`");
    check(&good, &json!({"prompt": "a", "completion": "", "label": true}), "empty_content", "`completion`");
    check(&good, &json!({"completion": "b", "label": true}), "missing_field", "`prompt`");
}

/// The report counts both sides, and a pair is too long when one of them is.
#[test]
fn a_report_counts_pairs_as_rows() {
    let pair = |rejected: usize| json!({"prompt": "ab", "chosen": "c", "rejected": "d".repeat(rejected)});
    let report = report(format!("{}\n{}\n{}", pair(4), pair(LIMIT), pair(4)));
    assert_eq!(report.format.as_deref(), Some("preference"));
    assert_eq!((report.rows, report.usable_rows, report.too_long_rows, report.duplicate_rows), (3, 2, 1, 1));
    assert_eq!(
        (report.tokens, report.trained_tokens, report.longest_row),
        (2 * (4 + 7), 2 * (2 + 5), LIMIT as u64 + 3)
    );
    assert_eq!(report.examples[1].trained_text, ["dddd<|im_end|>"]);
}

/// Questions with what a grader needs; a file of conversations stays one.
#[test]
fn questions_are_rendered_up_to_the_answer() {
    let ask = |text: &str| json!({"messages": [{"role": "user", "content": text}], "answer": 4, "tags": ["a"]});
    let rows = load(format!("{}\n{}", ask("2+2"), ask("hi")).as_bytes(), &context(&text())).unwrap();
    let Row::Prompt(prompt) = &rows[0] else { panic!("{rows:?}") };
    assert_eq!(prompt.item["answer"], 4);
    let shown = text().tokenizer.decode(&prompt.text.ids, false).unwrap();
    assert_eq!(shown, "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(rows[0].trained(), 0);
    let report = report(ask("2+2").to_string());
    assert_eq!((report.format.as_deref(), report.usable_rows, report.trained_tokens), (Some("reinforcement"), 1, 0));
    let answered = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    check(&ask("2+2"), &answered, "invalid_message", "the last message must be the user's");
    check(&ask("2+2"), &json!({"messages": [{"role": "user", "content": " "}]}), "empty_content", "message 0");
}

/// What a judge's file says beside its pairs.
#[test]
fn labels_may_be_uncertain() {
    let row = |probability: Value| {
        json!({"prompt": "ab", "chosen": "c", "rejected": "de", "probability": probability,
                                          "judgement": {"judge": "j", "orders": [0.9, 0.5]}})
    };
    let Row::Pair(pair) = first(&row(json!(0.7))) else { panic!() };
    assert_eq!(pair.probability, 0.7);
    let Row::Pair(pair) = first(&row(Value::Null)) else { panic!() };
    assert_eq!(pair.probability, 1.0);
    for wrong in [json!(0.4), json!(1.1), json!("0.7")] {
        check(&row(json!(1)), &row(wrong), "invalid_probability", "0.5 to 1");
    }
}
