//! Datasets as users write them, good and bad, read for a small random base.

use attune::{
    data::{self, Context, DataError, Example, MAX_LINE_BYTES},
    domain::FileReport,
    text::Text,
};
use proptest::prelude::*;
use serde_json::json;

use crate::support::tiny::{Tiny, VOCAB};

const LIMIT: usize = 200;
const IM_END: u32 = 258;
const GOOD: &str = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yo"}]}"#;

fn text() -> Text {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    Text::open(dir.path()).unwrap()
}

fn context(text: &Text) -> Context<'_> {
    Context { text, base_id: "tiny", max_seq_len: LIMIT, vocab: VOCAB }
}

fn report(file: impl AsRef<[u8]>) -> FileReport {
    data::validate(file.as_ref(), &context(&text())).unwrap()
}

fn examples(file: impl AsRef<[u8]>) -> Vec<Example> {
    data::load(file.as_ref(), &context(&text())).unwrap()
}

/// Errors as lines and codes.
fn errors(report: &FileReport) -> Vec<(u64, &str)> {
    report.errors.iter().map(|error| (error.line, error.code.as_str())).collect()
}

/// The runs of trained tokens of the only row.
fn trained(file: impl AsRef<[u8]>) -> Vec<String> {
    let report = report(file);
    assert_eq!(errors(&report), []);
    report.examples.into_iter().next().unwrap().trained_text
}

fn messages(turns: &[(&str, &str)]) -> String {
    let turns: Vec<_> = turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({"messages": turns}).to_string()
}

/// A row of prompt and completion that is `tokens` long with the token of its end.
fn completion(tokens: usize) -> String {
    json!({"prompt": "ab", "completion": "c".repeat(tokens - 3)}).to_string()
}

/// A bad line after a good one is the only error, with its number and code; a job refuses the file with the same.
fn check_bad(bad: impl AsRef<[u8]>, code: &str) {
    let file = [GOOD.as_bytes(), b"\n", bad.as_ref(), b"\n", GOOD.as_bytes()].concat();
    let shown = String::from_utf8_lossy(&bad.as_ref()[..bad.as_ref().len().min(90)]).into_owned();
    let report = report(&file);
    assert_eq!(errors(&report), [(2, code)], "{shown}");
    assert_eq!((report.rows, report.usable_rows, report.error_count), (3, 2, 1), "{shown}");
    match data::load(file.as_slice(), &context(&text())) {
        Err(DataError::Line(error)) => assert_eq!((error.line, error.code.as_str()), (2, code), "{shown}"),
        other => panic!("{shown}: {other:?}"),
    }
}

#[test]
fn lines_that_are_no_rows_are_named() {
    check_bad(r#"{"messages":[{"role":"user""#, "invalid_json");
    check_bad(format!("\u{feff}{GOOD}"), "invalid_json");
    check_bad(format!("{GOOD}{GOOD}"), "invalid_json");
    check_bad(GOOD.replace("yo", r"\ud800"), "invalid_json");
    check_bad(GOOD.replace("yo", &"[".repeat(100_000)).replace('"', ""), "invalid_json");
    check_bad(format!(r#"{{"messages":{}"#, "[".repeat(100_000)), "invalid_json");
    check_bad(b"{\"prompt\":\"\xff\",\"completion\":\"a\"}", "invalid_utf8");
    check_bad(GOOD.replace("yo", &"y".repeat(MAX_LINE_BYTES + (1 << 20))), "line_too_long");
    check_bad("[1,2]", "not_an_object");
    check_bad("null", "not_an_object");
    check_bad("{}", "unknown_format");
    check_bad(r#"{"text":"a"}"#, "unknown_format");
    check_bad(r#"{"prompt":"a","completion":"b"}"#, "mixed_formats");
}

#[test]
fn conversations_that_cannot_be_learnt_from_are_named() {
    check_bad(GOOD.replace(r#""role":"user""#, r#""role":"user","mood":1"#), "unknown_field");
    check_bad(GOOD.replace(r#"{"messages""#, r#"{"id":7,"messages""#), "unknown_field");
    check_bad(r#"{"messages":"hi"}"#, "invalid_type");
    check_bad(GOOD.replace(r#"{"role":"user","content":"hi"}"#, "7"), "invalid_message");
    check_bad(GOOD.replace(r#""user""#, r#""wizard""#), "invalid_message");
    check_bad(GOOD.replace(r#""role":"user","#, ""), "invalid_message");
    check_bad(messages(&[("user", "hi")]), "missing_assistant");
    check_bad(r#"{"messages":[]}"#, "missing_assistant");
    check_bad(messages(&[("user", "hi"), ("assistant", "a"), ("assistant", "b")]), "invalid_message");
    check_bad(messages(&[("tool", "4"), ("assistant", "a")]), "invalid_message");
    check_bad(messages(&[("user", "hi"), ("system", "late"), ("assistant", "a")]), "invalid_message");
    check_bad(messages(&[("user", "hi"), ("assistant", " \n")]), "empty_content");
    check_bad(messages(&[("user", ""), ("assistant", "a")]), "empty_content");
    check_bad(GOOD.replace(r#""yo""#, "5"), "invalid_message");
    check_bad(GOOD.replace(r#""yo""#, r#"[{"type":"image_url","image_url":"x"}]"#), "invalid_message");
    check_bad(GOOD.replace(r#""yo""#, r#""yo","weight":0.5"#), "invalid_weight");
    check_bad(GOOD.replace(r#""yo""#, r#""yo","weight":0"#), "no_trained_tokens");
    let many: Vec<_> = (0..1025).map(|i| if i % 2 == 0 { ("user", "a") } else { ("assistant", "b") }).collect();
    check_bad(messages(&many), "too_many_messages");
}

/// The same for files of another format.
#[test]
fn rows_of_other_formats_are_checked_too() {
    let first_bad = |good: &str, bad: &str, code: &str| {
        let report = report(format!("{good}\n{bad}"));
        assert_eq!(errors(&report), [(2, code)], "{bad}");
    };
    let good = r#"{"prompt":"a","completion":"b"}"#;
    first_bad(good, r#"{"prompt":"a"}"#, "missing_field");
    first_bad(good, r#"{"prompt":"a","completion":""}"#, "empty_content");
    first_bad(good, r#"{"prompt":1,"completion":"b"}"#, "invalid_type");
    first_bad(good, r#"{"prompt":"a","completion":"b","label":true}"#, "unknown_field");
    let good = r#"{"input_ids":[1,2],"labels":[-100,2]}"#;
    first_bad(good, r#"{"input_ids":[1,2],"labels":[-100]}"#, "labels_length");
    first_bad(good, r#"{"input_ids":[1,2],"labels":[2,-100]}"#, "invalid_labels");
    first_bad(good, r#"{"input_ids":[1,260],"labels":[-100,260]}"#, "token_out_of_range");
    first_bad(good, r#"{"input_ids":[1,-2],"labels":[-100,-2]}"#, "invalid_tokens");
    first_bad(good, r#"{"input_ids":[1,2.5],"labels":[-100,2.5]}"#, "invalid_tokens");
    first_bad(good, r#"{"input_ids":[],"labels":[]}"#, "empty_content");
    first_bad(good, r#"{"input_ids":[1,2],"labels":[1,-100]}"#, "no_trained_tokens");
    let good = r#"{"instruction":"a","output":"b"}"#;
    first_bad(good, r#"{"instruction":"a","output":""}"#, "empty_content");
    first_bad(good, r#"{"instruction":"a","input":3,"output":"b"}"#, "invalid_type");
    let good = r#"{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}"#;
    first_bad(good, r#"{"conversations":[{"from":"human","value":"a"}]}"#, "missing_assistant");
    first_bad(good, r#"{"conversations":[{"from":"ghost","value":"a"}]}"#, "invalid_message");
}
