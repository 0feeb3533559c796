//! Every family against transformers: `tests/fixtures/logits/make.py` says how the numbers were made.

use std::path::PathBuf;

use attune::model::{Base, Batch, Sequence};
use candle_core::{Device, safetensors};

/// The largest difference between our logits and transformers', over all positions, and their spread.
fn difference(family: &str) -> (f32, f32) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/logits").join(family);
    let base = Base::open(family, &folder).unwrap();
    let answer = safetensors::load(folder.with_extension("safetensors"), &Device::Cpu).unwrap();
    let tokens: Vec<u32> = answer["ids"].to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect();
    let sequences = vec![Sequence { tokens: &tokens, hook: None, cache: None }];
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    let ours = base.logits(&hidden, None).unwrap();
    let theirs = &answer["logits"];
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

// llama3 and linear rope scaling; a window shorter than the prompt; biases; norms of queries and keys.
families!(llama, llama_scaled, llama_linear, mistral, qwen2, qwen3);
