//! Every family against transformers: `tests/fixtures/logits/make.py` says how the numbers were made.

use std::path::PathBuf;

use attune::{
    model::{Base, Batch, Sequence},
    text::Text,
};
use candle_core::{Device, Tensor, safetensors};

/// The largest difference between our logits and transformers', over all positions, and their spread.
fn difference(family: &str) -> (f32, f32) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logits").join(family);
    let base = Base::open(family, &folder).unwrap();
    let answer = safetensors::load(folder.with_extension("safetensors"), &Device::Cpu).unwrap();
    compare(&base, &ids(&answer["ids"]), &answer["logits"])
}

fn ids(tensor: &Tensor) -> Vec<u32> {
    tensor.to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect()
}

fn compare(base: &Base, tokens: &[u32], theirs: &Tensor) -> (f32, f32) {
    let sequences = vec![Sequence { tokens, hook: None, cache: None }];
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    let ours = base.logits(&hidden, None).unwrap();
    assert_eq!(ours.shape(), theirs.shape());
    let largest = |x: candle_core::Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    (largest((&ours - theirs).unwrap()), largest(theirs.clone()))
}

macro_rules! families {
    ($($family:ident),*) => {
        $(
            #[test]
            fn $family() {
                let (difference, spread) = difference(stringify!($family));
                assert!(spread > 1.0, "the answer is flat: {spread}");
                assert!(difference < 1e-4, "{difference:e} of {spread}");
            }
        )*
    };
}

// llama3 and linear rope scaling; a window shorter than the prompt; biases; norms of queries and keys; two kinds of
// layers, and norms around both blocks; LongRoPE for prompts within and beyond the first context, a part of each head.
families!(llama, llama_scaled, llama_linear, mistral, qwen2, qwen3, gemma3, gemma3_scaled, phi3, phi3_short, phi3_long);

#[test]
#[ignore = "needs a real model, and transformers' answer: tests/fixtures/logits/real.py says how"]
fn a_real_model() {
    let path = |name: &str| PathBuf::from(std::env::var(name).unwrap());
    let (model, answer) = (path("ATTUNE_REAL_MODEL"), path("ATTUNE_REAL_ANSWER"));
    let answer = safetensors::load(answer, &Device::Cpu).unwrap();
    let text = Text::open(&model).unwrap();
    for i in 0..4 {
        let written = String::from_utf8(answer[&format!("text.{i}")].to_vec1().unwrap()).unwrap();
        assert_eq!(text.tokenizer.encode(&written, false).unwrap(), ids(&answer[&format!("ids.{i}")]), "{written:?}");
    }
    let (difference, spread) = compare(&Base::open("real", &model).unwrap(), &ids(&answer["ids.0"]), &answer["logits"]);
    println!("{difference:e} of {spread}");
    assert!(difference < 1e-5 * spread.max(10.0), "{difference:e} of {spread}");
}
