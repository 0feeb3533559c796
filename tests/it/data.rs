//! Datasets as users write them, good and bad, read for a small random base.

mod labelled;
mod preference;

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
    let rows = data::load(file.as_ref(), &context(&text())).unwrap();
    rows.iter().flat_map(|row| row.examples().cloned()).collect()
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
    check_bad(format!(r#"{{"messages":{}"#, "[".repeat(100_000)), "invalid_json");
    check_bad(b"{\"prompt\":\"\xff\",\"completion\":\"a\"}", "invalid_utf8");
    check_bad(GOOD.replace("yo", &"y".repeat(MAX_LINE_BYTES + (1 << 20))), "line_too_long");
    check_bad("[1,2]", "not_an_object");
    check_bad("null", "not_an_object");
    check_bad("{}", "unknown_format");
    check_bad(r#"{"words":"a"}"#, "unknown_format");
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
    first_bad(good, r#"{"prompt":"a","completion":"b","mood":true}"#, "unknown_field");
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

#[test]
fn files_without_rows_are_an_error() {
    for file in ["", "\n\n", " \r\n", "\u{feff}"] {
        let report = report(file);
        assert_eq!(errors(&report), [(1, "empty_file")], "{file:?}");
        assert_eq!((report.rows, report.format), (0, None));
        assert!(matches!(data::load(file.as_bytes(), &context(&text())), Err(DataError::Empty)));
    }
}

#[test]
fn blank_lines_crlf_and_a_byte_order_mark_do_no_harm() {
    let report = report(format!("\u{feff}{GOOD}\r\n\r\n{GOOD}\r\n[]\n\n  \n"));
    assert_eq!(errors(&report), [(4, "not_an_object")]);
    assert_eq!((report.rows, report.usable_rows), (3, 2));
    assert_eq!(examples(format!("\n{GOOD}\r\n\r\n")), [Example { line: 2, ..examples(GOOD).remove(0) }]);
}

#[test]
fn errors_beyond_the_first_fifty_are_counted() {
    let report = report("nonsense\n".repeat(53));
    assert_eq!((report.errors.len(), report.error_count, report.rows), (50, 53, 53));
    assert_eq!(report.errors[49].line, 50);
}

/// The trained tokens are what the model has to write: the assistant's text and the token that ends its turn.
#[test]
fn the_assistants_words_and_their_end_are_trained() {
    assert_eq!(trained(GOOD), ["yo<|im_end|>"]);
    let turns = [("system", "be brief"), ("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "é\n")];
    assert_eq!(trained(messages(&turns)), ["b c<|im_end|>", "é\n<|im_end|>"]);
    let quoting = [("user", "a"), ("assistant", "b<|im_end|>c")];
    assert_eq!(trained(messages(&quoting)), ["b<|im_end|>c<|im_end|>"]);
    let example = examples(GOOD).remove(0);
    assert_eq!(example.labels.len(), example.ids.len());
    let places: Vec<_> = (0..example.ids.len()).filter(|i| example.labels[*i].is_some()).collect();
    assert_eq!(places.iter().map(|i| example.ids[*i]).collect::<Vec<_>>(), [u32::from(b'y'), u32::from(b'o'), IM_END]);
    assert_eq!(example.trained(), 3);
}

#[test]
fn turns_of_weight_0_are_read_only() {
    let row = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "good", "weight": 1},
    ]});
    assert_eq!(trained(row.to_string()), ["good<|im_end|>"]);
}

#[test]
fn content_parts_are_joined() {
    let parts = r#"[{"type":"text","text":"y"},{"type":"text","text":"o"}]"#;
    assert_eq!(examples(GOOD.replace(r#""yo""#, parts)), examples(GOOD));
}

#[test]
fn a_completion_is_trained_with_its_end() {
    let row = r#"{"prompt":"2+2=","completion":"4"}"#;
    assert_eq!(trained(row), ["4<|im_end|>"]);
    let example = examples(row).remove(0);
    assert_eq!((example.ids.len(), example.ids.last()), (6, Some(&IM_END)));
}

/// A tokenizer that wants a BOS gets one, whether or not the template writes it.
#[test]
fn bos_is_written_once() {
    const BOS: u32 = 256;
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    let path = dir.path().join("tokenizer_config.json");
    let written = std::fs::read_to_string(&path).unwrap();
    for template in ["{% for", "{{ bos_token }}{% for"] {
        let config = written.replace("\"add_bos_token\":false", "\"add_bos_token\":true");
        std::fs::write(&path, config.replacen("{% for", template, 1)).unwrap();
        let text = Text::open(dir.path()).unwrap();
        for row in [GOOD, r#"{"prompt":"a","completion":"b"}"#] {
            let loaded = data::load(row.as_bytes(), &context(&text)).unwrap().remove(0);
            let example = loaded.examples().next().unwrap();
            assert_eq!(example.ids[0], BOS, "{row}");
            assert_eq!(example.ids.iter().filter(|id| **id == BOS).count(), 1, "{row}");
            assert_eq!(example.labels[0], None, "{row}");
        }
    }
}

#[test]
fn older_formats_become_conversations() {
    let alpaca = report(r#"{"instruction":"Sum up.","input":"Long text","output":"Short"}"#);
    assert_eq!(alpaca.format.as_deref(), Some("alpaca"));
    assert_eq!(alpaca.examples[0].trained_text, ["Short<|im_end|>"]);
    assert!(alpaca.examples[0].text.contains("Sum up.\n\nLong text<|im_end|>"));
    let share = r#"{"id":"x","conversations":[{"from":"system","value":""},{"from":"human","value":"hi"},
                   {"from":"gpt","value":"yo"}]}"#;
    let share = share.replace('\n', " ");
    assert_eq!(report(&share).format.as_deref(), Some("sharegpt"));
    assert_eq!(examples(&share), examples(GOOD));
    assert_eq!(report(GOOD).format.as_deref(), Some("chat"));
}

#[test]
fn rows_of_ids_are_taken_as_they_are() {
    let file = r#"{"input_ids":[5,6,7,258],"labels":[-100,6,-100,258]}"#;
    let expected = Example { line: 1, ids: vec![5, 6, 7, 258], labels: vec![None, Some(6), None, Some(258)] };
    assert_eq!(examples(file), [expected]);
    assert_eq!(report(file).format.as_deref(), Some("tokens"));
}

/// Layout and key order do not make a row another one.
#[test]
fn equal_rows_are_counted() {
    let same = r#" {"messages": [{"role":"user","content":"hi"}, {"role":"assistant","content":"yo"}]}"#;
    let report = report(format!("{GOOD}\n{same}\n{}\n{GOOD}\n{GOOD}\n", GOOD.replace("yo", "ya")));
    assert_eq!((report.rows, report.usable_rows, report.duplicate_rows), (5, 5, 3));
}

#[test]
fn rows_that_are_too_long_are_counted_and_not_cut() {
    let file = [completion(LIMIT), completion(LIMIT + 1), completion(9)].join("\n");
    let found = report(&file);
    assert_eq!(errors(&found), []);
    assert_eq!((found.rows, found.usable_rows, found.too_long_rows), (3, 2, 1));
    assert_eq!((found.longest_row, found.tokens), (LIMIT as u64 + 1, LIMIT as u64 + 9));
    assert_eq!(found.trained_tokens, (LIMIT - 2 + 9 - 2) as u64);
    assert_eq!(examples(&file).iter().map(|row| row.ids.len()).collect::<Vec<_>>(), [LIMIT, LIMIT + 1, 9]);
    let long = report(messages(&[("user", &"a".repeat(LIMIT)), ("assistant", "b")]));
    assert_eq!((long.rows, long.usable_rows, long.too_long_rows, long.error_count), (1, 0, 1, 0));
}

#[test]
fn the_histogram_sums_to_the_rows() {
    let lengths = [4, 7, 8, 9, 15, 16, 64, LIMIT, LIMIT + 60];
    let file: Vec<_> = lengths.iter().map(|tokens| completion(*tokens)).collect();
    let report = report(file.join("\n"));
    let bins: Vec<_> = report.histogram.iter().map(|bin| (bin.from, bin.to, bin.rows)).collect();
    assert_eq!(bins, [(4, 8, 2), (8, 16, 3), (16, 32, 1), (64, 128, 1), (128, 256, 1), (256, 512, 1)]);
}

#[test]
fn structure_is_checked_without_a_base() {
    let file = format!("{GOOD}\n{}\n", messages(&[("user", "hi")]));
    let report = data::check_structure(file.as_bytes()).unwrap();
    assert_eq!(errors(&report), [(2, "missing_assistant")]);
    assert_eq!((report.format.as_deref(), report.rows, report.usable_rows, report.tokens), (Some("chat"), 2, 1, 0));
}

/// Pieces that rows are made of, in any order: deeper into the parser than plain noise gets.
fn fragments() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(GOOD.as_bytes().to_vec()),
        prop::sample::select(vec!["{", "}", "[", "]", "\"", ":", ",", "\n", "\r\n", "null", "-100", "1e999", "\\u"])
            .prop_map(|s| s.as_bytes().to_vec()),
        prop::sample::select(vec![
            "\"messages\"",
            "\"role\"",
            "\"content\"",
            "\"user\"",
            "\"assistant\"",
            "\"weight\""
        ])
        .prop_map(|s| s.as_bytes().to_vec()),
        prop::sample::select(vec![
            "\"prompt\":",
            "\"completion\":",
            "\"chosen\":",
            "\"label\":",
            "\"input_ids\":[",
            "\"labels\":[",
            "<|im_end|>"
        ])
        .prop_map(|s| s.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..6),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

fn gives_a_report(file: &[u8], text: &Text) {
    let report = data::validate(file, &context(text)).unwrap();
    assert_eq!(report.usable_rows + report.too_long_rows + report.error_count, report.rows.max(1));
    let loaded = data::load(file, &context(text));
    assert_eq!(loaded.is_ok(), report.error_count == 0);
    for row in loaded.unwrap_or_default() {
        assert!(row.examples().all(|text| text.ids.len() == text.labels.len()));
    }
}

#[test]
fn any_bytes_give_a_report_or_an_error() {
    let text = text();
    proptest!(ProptestConfig::with_cases(300), |(file in prop_oneof![prop::collection::vec(any::<u8>(), 0..400), fragments()])| {
        gives_a_report(&file, &text);
    });
    proptest!(ProptestConfig::with_cases(200), |(user in "\\PC{1,40}", said in "\\PC{1,40}")| {
        gives_a_report(messages(&[("user", &user), ("assistant", &said)]).as_bytes(), &text);
    });
}
