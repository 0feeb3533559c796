//! Tokenizers against the vocabulary cases that llama.cpp publishes, fetched as a package.

use std::{
    fs,
    path::{Path, PathBuf},
};

use attune::{formats::gguf::Gguf, text::Text};

use crate::support::package;

/// Families and their cases: texts separated by a line, and a line of ids for each.
const FAMILIES: [&str; 7] = ["gpt-2", "qwen2", "llama-bpe", "starcoder", "refact", "command-r", "mpt"];

#[test]
fn ids_agree_with_the_published_vocabulary_cases() {
    let models = package::source("llama-cpp-python", "0.3.36").join("vendor/llama.cpp/models");
    for family in FAMILIES {
        check(&models, family);
    }
}

fn check(models: &Path, family: &str) {
    let file = |ending: &str| -> PathBuf { models.join(format!("ggml-vocab-{family}.gguf{ending}")) };
    let text = Text::from_gguf(&Gguf::open(&file("")).unwrap()).unwrap();
    let inputs = fs::read_to_string(file(".inp")).unwrap();
    let outputs = fs::read_to_string(file(".out")).unwrap();
    let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let mut checked = 0;
    for (input, output) in inputs.iter().zip(outputs.lines()) {
        let expected: Vec<u32> = output.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(text.tokenizer.encode(input, false).unwrap(), expected, "{family}: {input:?}");
        assert_eq!(text.tokenizer.decode(&expected, false).unwrap(), *input, "{family}");
        checked += 1;
    }
    assert!(checked > 40, "{family}: only {checked} cases");
}
