//! Every family against transformers: `tests/fixtures/logits/make.py` says how the numbers were made, `real.py` those of
//! real models.

use std::path::{Path, PathBuf};

use attune::{
    model::{Base, Batch, Sequence},
    text::Text,
};
use candle_core::{DType, Device, Tensor, safetensors};

use crate::support::package;

/// The largest difference between our logits and transformers', over all positions, and their spread.
fn difference(family: &str) -> (f32, f32) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logits").join(family);
    let base = Base::open(family, &folder).unwrap();
    let answer = safetensors::load(folder.with_extension("safetensors"), &Device::Cpu).unwrap();
    compare(&logits(&base, &ids(&answer["ids"])), &answer["logits"])
}

fn ids(tensor: &Tensor) -> Vec<u32> {
    tensor.to_dtype(DType::U32).unwrap().to_vec1().unwrap()
}

fn logits(base: &Base, tokens: &[u32]) -> Tensor {
    let sequences = vec![Sequence { tokens, branches: &[], hook: None, cache: None }];
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    base.logits(&hidden, None).unwrap()
}

fn compare(ours: &Tensor, theirs: &Tensor) -> (f32, f32) {
    assert_eq!(ours.shape(), theirs.shape());
    let largest = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    (largest((ours - theirs).unwrap()), largest(theirs.clone()))
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

/// A real GGUF file against transformers, by texts' ids and by some of the vocabulary's scores: `real.py` says how.
fn real(name: &str, model: &Path) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logits/real");
    let answer = safetensors::load(folder.join(name).with_extension("safetensors"), &Device::Cpu).unwrap();
    let text = Text::open(model).unwrap();
    for i in 0..4 {
        let written = String::from_utf8(answer[&format!("text.{i}")].to_vec1().unwrap()).unwrap();
        assert_eq!(text.tokenizer.encode(&written, false).unwrap(), ids(&answer[&format!("ids.{i}")]), "{written:?}");
    }
    let ours = logits(&Base::open(name, model).unwrap(), &ids(&answer["ids.0"]));
    let best = answer["logits"].argmax(1).unwrap();
    assert_eq!(ids(&ours.argmax(1).unwrap()), ids(&answer["columns"].index_select(&best, 0).unwrap()));
    let some = ours.index_select(&answer["columns"], 1).unwrap();
    let (difference, spread) = compare(&some, &answer["logits"]);
    assert!(difference < 1e-5 * spread.max(10.0), "{difference:e} of {spread}");
}

#[test]
fn smollm2() {
    real("smollm2", &package::smollm2());
}

#[test]
fn gemma3_270m() {
    real("gemma3_270m", &package::gemma3());
}
