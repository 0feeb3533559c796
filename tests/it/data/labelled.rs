//! Texts with a label, and words with tags.

use attune::{
    data::{self, Row},
    domain::dataset::RowKind,
};
use serde_json::{Value, json};

use super::{context, errors, report, text};

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

fn load(rows: &[Value]) -> Vec<Row> {
    data::load(lines(rows).as_bytes(), &context(&text())).unwrap()
}

#[test]
fn a_text_is_all_of_its_tokens() {
    let rows = load(&[json!({"text": "good tent", "label": "praise"}), json!({"text": "é", "label": 3})]);
    let (Row::Labelled(first), Row::Labelled(second)) = (&rows[0], &rows[1]) else { panic!("{rows:?}") };
    // A byte is a token of the tiny base, which puts nothing before a text.
    assert_eq!(first.text.ids.len(), 9);
    assert_eq!((first.marks[0].tokens.clone(), first.marks[0].label.as_str()), (0..9, "praise"));
    assert_eq!((second.text.ids.len(), second.marks[0].label.as_str()), (2, "3"));
    assert_eq!((first.text.trained(), rows[0].trained(), rows[0].kind()), (0, 1, RowKind::Labelled));
}

#[test]
fn a_word_is_the_tokens_between_two_spaces() {
    let rows = load(&[json!({"tokens": ["Ann", "saw", "Żar", "."], "tags": ["B-PER", "O", "B-LOC", "O"]})]);
    let Row::Tagged(row) = &rows[0] else { panic!("{rows:?}") };
    let spelled = |span: &std::ops::Range<usize>| {
        let ids: Vec<u8> = row.text.ids[span.clone()].iter().map(|id| text_byte(*id)).collect();
        String::from_utf8(ids).unwrap().trim().to_owned()
    };
    let words: Vec<String> = row.marks.iter().map(|mark| spelled(&mark.tokens)).collect();
    assert_eq!(words, ["Ann", "saw", "Żar", "."]);
    let tags: Vec<&str> = row.marks.iter().map(|mark| mark.label.as_str()).collect();
    assert_eq!(tags, ["B-PER", "O", "B-LOC", "O"]);
}

/// The byte that a token of the tiny base stands for.
fn text_byte(id: u32) -> u8 {
    text().tokenizer.token_bytes(id)[0]
}

#[test]
fn a_report_counts_labels() {
    let found = report(lines(&[
        json!({"text": "a", "label": "x"}),
        json!({"text": "b", "label": "y"}),
        json!({"text": "c", "label": "x"}),
        // Too long to be trained on.
        json!({"text": "d".repeat(400), "label": "z"}),
    ]));
    assert_eq!((errors(&found), found.format.as_deref()), (vec![], Some("labelled_text")));
    let labels: Vec<(&str, u64, u64)> =
        found.labels.iter().map(|one| (one.label.as_str(), one.count, one.first_line)).collect();
    assert_eq!(labels, [("x", 2, 1), ("y", 1, 2)]);
    assert_eq!((found.usable_rows, found.too_long_rows, found.trained_tokens), (3, 1, 3));
    assert_eq!(found.examples[1].trained_text, ["y"]);

    let found =
        report(lines(&[json!({"tokens": ["a", "b"], "tags": ["O", "B-X"]}), json!({"tokens": ["c"], "tags": ["O"]})]));
    assert_eq!(found.format.as_deref(), Some("tagged_tokens"));
    let labels: Vec<(&str, u64)> = found.labels.iter().map(|one| (one.label.as_str(), one.count)).collect();
    assert_eq!(labels, [("B-X", 1), ("O", 2)]);
    assert_eq!(report(super::GOOD).labels, []);
}

#[test]
fn bad_rows_are_named_by_line() {
    let (text, words) = (json!({"text": "a", "label": "x"}), json!({"tokens": ["a"], "tags": ["O"]}));
    let cases = [
        (&text, json!({"text": "a"}), "missing_field", "`label`"),
        (&text, json!({"text": "a", "label": null}), "missing_field", "`label`"),
        (&text, json!({"text": "a", "label": 1.5}), "invalid_label", "a number"),
        (&text, json!({"text": "a", "label": true}), "invalid_label", "a boolean"),
        (&text, json!({"text": "a", "label": ""}), "invalid_label", "1 to 100"),
        (&text, json!({"text": "a", "label": "l".repeat(101)}), "invalid_label", "1 to 100"),
        (&text, json!({"text": " ", "label": "x"}), "empty_content", "`text`"),
        (&text, json!({"text": 3, "label": "x"}), "invalid_type", "`text`"),
        (&text, json!({"text": "a", "label": "x", "id": 1}), "unknown_field", "`id`"),
        (&text, words.clone(), "mixed_formats", "tagged_tokens"),
        (&words, json!({"tokens": ["a"]}), "missing_field", "`tags`"),
        (&words, json!({"tags": ["a"]}), "missing_field", "`tokens`"),
        (&words, json!({"tokens": ["a", "b"], "tags": ["O"]}), "labels_length", "2 words"),
        (&words, json!({"tokens": [], "tags": []}), "empty_content", "`tokens`"),
        (&words, json!({"tokens": ["a", " "], "tags": ["O", "O"]}), "empty_content", "token 1"),
        (&words, json!({"tokens": ["a", 3], "tags": ["O", "O"]}), "invalid_type", "token 1"),
        (&words, json!({"tokens": ["a"], "tags": [null]}), "invalid_label", "tag 0"),
        (&words, json!({"tokens": "a", "tags": ["O"]}), "invalid_type", "`tokens`"),
        (&words, json!({"tokens": ["a"], "tags": "O"}), "invalid_type", "`tags`"),
    ];
    for (good, bad, code, part) in cases {
        let found = report(lines(&[good.clone(), bad.clone(), good.clone()]));
        assert_eq!(errors(&found), [(2, code)], "{bad}");
        assert!(found.errors[0].message.contains(part), "{bad}: {}", found.errors[0].message);
    }
    let many: Vec<Value> = (0..1002).map(|i| json!({"text": "a", "label": i})).collect();
    assert_eq!(errors(&report(lines(&many))), [(1001, "too_many_labels"), (1002, "too_many_labels")]);
}
