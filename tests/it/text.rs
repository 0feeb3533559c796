//! Tokenizers against the vocabulary cases that llama.cpp publishes, fetched as a package.

mod tools;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use attune::{
    formats::gguf::Gguf,
    text::{ChatTemplate, Detokenizer, Text},
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::{
    package,
    tiny::{Tiny, VOCAB},
};

/// Families and their cases: texts separated by a line, and a line of ids for each. SentencePiece puts a space before
/// each text.
const FAMILIES: [(&str, &str); 9] = [
    ("gpt-2", ""),
    ("qwen2", ""),
    ("llama-bpe", ""),
    ("starcoder", ""),
    ("refact", ""),
    ("command-r", ""),
    ("mpt", ""),
    ("llama-spm", " "),
    ("phi-3", " "),
];

#[test]
fn ids_agree_with_the_published_vocabulary_cases() {
    let models = package::source("llama-cpp-python", "0.3.36").join("vendor/llama.cpp/models");
    for (family, space) in FAMILIES {
        check(&models, family, space);
    }
}

fn check(models: &Path, family: &str, space: &str) {
    let file = |ending: &str| -> PathBuf { models.join(format!("ggml-vocab-{family}.gguf{ending}")) };
    let text = Text::from_gguf(&Gguf::open(&file("")).unwrap()).unwrap();
    let inputs = fs::read_to_string(file(".inp")).unwrap();
    let outputs = fs::read_to_string(file(".out")).unwrap();
    let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let mut checked = 0;
    for (input, output) in inputs.iter().zip(outputs.lines()) {
        let expected: Vec<u32> = output.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(text.tokenizer.encode(input, false).unwrap(), expected, "{family}: {input:?}");
        let space = if input.is_empty() { "" } else { space };
        assert_eq!(text.tokenizer.decode(&expected, false).unwrap(), format!("{space}{input}"), "{family}");
        checked += 1;
    }
    assert!(checked > 40, "{family}: only {checked} cases");
}

fn smollm2() -> &'static Text {
    static TEXT: OnceLock<Text> = OnceLock::new();
    TEXT.get_or_init(|| Text::open(&package::smollm2()).unwrap())
}

fn tiny() -> &'static Text {
    static TEXT: OnceLock<Text> = OnceLock::new();
    TEXT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        Tiny::default().write(dir.path());
        Text::open(dir.path()).unwrap()
    })
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// Ids of a chat that the model is to answer.
fn prompt_ids(text: &Text, messages: &[Value]) -> Vec<u32> {
    let prompt = text.template.as_ref().unwrap().render(messages, None, true).unwrap();
    text.tokenizer.encode(&prompt, true).unwrap()
}

// The expected ids of SmolLM2 come from Python: `tokenizers` 0.23.3 with the vocabulary and merges of the same file in a
// `models.BPE`, `pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])` as in the
// model's tokenizer.json, its control tokens added as special ones; the prompt rendered by `jinja2` with trim_blocks and
// lstrip_blocks from the file's template.

/// The turn that SmolLM2's template puts first where there is no system message.
#[rustfmt::skip]
const DEFAULT_SYSTEM: [u32; 21] = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
];
#[rustfmt::skip]
const QUESTION: [u32; 35] = [
    1, 4093, 198, 1780, 506, 216, 33, 34, 35, 36, 1232, 216, 37, 28, 38, 39, 40, 47, 198, 142, 246, 593, 15107, 235, 231,
    216, 15486, 46494, 37366, 2, 198, 1, 520, 9531, 198,
];
#[rustfmt::skip]
const TURNS: [u32; 36] = [
    1, 9690, 198, 6077, 5453, 30, 2, 198, 1, 4093, 198, 26843, 17, 2, 198, 1, 520, 9531, 198, 19556, 30, 2, 198, 1, 4093,
    198, 2, 260, 216, 1112, 2, 198, 1, 520, 9531, 198,
];

#[test]
fn a_chat_has_the_ids_that_the_reference_gives() {
    let text = smollm2();
    let question = message("user", "What's 1234 + 5,678?\nÜber 👍  naïve café");
    assert_eq!(prompt_ids(text, &[question]), [&DEFAULT_SYSTEM[..], &QUESTION].concat());
    let parts = json!({"role": "user", "content": [{"type": "text", "text": "<|im_end|> the"}, {"type": "text", "text": "  end"}]});
    let turns = [message("system", "Be brief."), message("user", "Hi!"), message("assistant", "Hello."), parts];
    assert_eq!(prompt_ids(text, &turns), TURNS);
    let plain = text.tokenizer.encode("a<|im_end|>b 12", false).unwrap();
    assert_eq!(plain, [81, 44, 108, 306, 79, 486, 108, 46, 82, 216, 33, 34], "a token written out is text");
    assert_eq!((text.tokenizer.bos, text.tokenizer.eos, &text.stop_ids[..]), (None, Some(2), &[2][..]));
    assert_eq!(text.tokenizer.vocab_size, 49_152);
}

#[test]
fn a_directory_gives_tokenizer_template_and_stops() {
    let text = tiny();
    let (start, end, newline) = (257, 258, 10);
    let bytes = |text: &str| text.bytes().map(byte_id).collect::<Vec<u32>>();
    let newline_id = byte_id(newline);
    let expected = [
        &[start][..],
        &bytes("user"),
        &[newline_id],
        &bytes("é!"),
        &[end, newline_id],
        &[start],
        &bytes("assistant"),
        &[newline_id],
    ]
    .concat();
    assert_eq!(prompt_ids(text, &[message("user", "é!")]), expected);
    assert_eq!(text.tokenizer.decode(&expected, true).unwrap(), "user\né!\nassistant\n");
    assert_eq!(text.tokenizer.decode(&expected[..1], false).unwrap(), "<|im_start|>");
    assert_eq!((text.tokenizer.bos, text.tokenizer.eos, &text.stop_ids[..]), (None, Some(258), &[258][..]));
    assert_eq!(text.tokenizer.vocab_size, VOCAB);
    assert!(text.tokenizer.decode(&[VOCAB as u32], false).unwrap_err().to_string().contains("outside the vocabulary"));
}

/// The tiny tokenizer numbers the bytes as they are.
fn byte_id(byte: u8) -> u32 {
    byte.into()
}

fn streamed(text: &Text, ids: &[u32]) -> String {
    let mut stream = Detokenizer::default();
    let mut all: String = ids.iter().map(|id| stream.push(&text.tokenizer, *id).unwrap()).collect();
    all.push_str(&stream.finish(&text.tokenizer).unwrap());
    all
}

#[test]
fn a_stream_waits_for_the_rest_of_a_character() {
    let text = tiny();
    let mut stream = Detokenizer::default();
    let pushed: Vec<String> = "é€👍".bytes().map(|b| stream.push(&text.tokenizer, byte_id(b)).unwrap()).collect();
    assert_eq!(pushed, ["", "é", "", "", "€", "", "", "", "👍"]);
    assert_eq!(stream.push(&text.tokenizer, byte_id(0xe2)).unwrap(), "");
    assert_eq!(stream.finish(&text.tokenizer).unwrap(), "\u{fffd}");
}

proptest! {
    #[test]
    fn a_stream_of_bytes_is_what_decoding_gives(ids in prop::collection::vec(0..VOCAB as u32, 0..40)) {
        prop_assert_eq!(streamed(tiny(), &ids), tiny().tokenizer.decode(&ids, true).unwrap());
    }

    #[test]
    fn a_stream_of_tokens_is_what_decoding_gives(ids in prop::collection::vec(0..49_152u32, 0..40)) {
        prop_assert_eq!(streamed(smollm2(), &ids), smollm2().tokenizer.decode(&ids, true).unwrap());
    }

    #[test]
    fn any_text_comes_back(written in any::<String>()) {
        for text in [tiny(), smollm2()] {
            let ids = text.tokenizer.encode(&written, false).unwrap();
            prop_assert!(ids.iter().all(|id| !text.tokenizer.is_special(*id)));
            prop_assert_eq!(&text.tokenizer.decode(&ids, false).unwrap(), &written);
        }
    }
}

fn refusal(template: &str) -> String {
    let template = ChatTemplate::new(template, "<s>", "</s>");
    template.and_then(|template| template.render(&[message("user", "hi")], None, true)).unwrap_err().to_string()
}

#[test]
fn a_template_that_fails_says_why() {
    let raised = "{% for m in messages %}\n{% if m.role != 'system' %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}";
    assert_eq!(refusal(raised), "chat template, line 2: no user");
    assert!(refusal("{% if %}").starts_with("chat template, line 1: "));
    assert!(refusal("{{ messages[0].nothing.deeper }}").starts_with("chat template, line 1: "));
}

#[test]
fn a_template_has_limits() {
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    let message = refusal(endless);
    assert!(message.contains("fuel"), "{message}");
    let large = "{% set x = 'x' * 1000000 %}{% for a in range(9999) %}{{ x }}{% endfor %}";
    let message = refusal(large);
    assert!(message.contains("above the limit of 33554432 bytes"), "{message}");
}
