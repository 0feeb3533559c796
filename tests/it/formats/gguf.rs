use attune::formats::{
    Storage,
    gguf::{Gguf, Value},
};
use proptest::prelude::*;

use super::damage;
use crate::support::gguf::Builder;

fn small() -> Builder {
    Builder::default()
        .meta("general.architecture", &Value::String("llama".into()))
        .meta("llama.block_count", &Value::Uint(2))
        .meta("tokens", &Value::Array(vec![Value::String("ä".into()), Value::String(String::new())]))
        .f32("a", &[2, 3], &[1.0, -2.0, 3.5, 0.25, 5.0, 6.0])
        .tensor("b", &[1, 32], 3, (0..20).collect())
}

fn refusal(builder: &Builder) -> String {
    refusal_of(builder.bytes())
}

fn refusal_of(bytes: Vec<u8>) -> String {
    match Gguf::from_bytes(bytes) {
        Ok(_) => panic!("the file was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn values_and_tensors_come_back() {
    let values = [
        ("uint", Value::Uint(7)),
        ("wide", Value::Uint(1 << 40)),
        ("int", Value::Int(-7)),
        ("narrow", Value::Int(-(1 << 40))),
        ("float", Value::Float(0.5)),
        ("yes", Value::Bool(true)),
        ("text", Value::String("größe".into())),
        ("list", Value::Array(vec![Value::Array(vec![Value::Int(-1)]), Value::Array(vec![])])),
    ];
    let builder = values.iter().fold(small(), |builder, (key, value)| builder.meta(key, value));
    let gguf = Gguf::from_bytes(builder.bytes()).unwrap();
    for (key, value) in &values {
        assert_eq!(gguf.metadata.get(*key), Some(value));
    }
    assert_eq!(gguf.str("general.architecture"), Some("llama"));
    assert_eq!(gguf.u64("llama.block_count"), Some(2));
    assert_eq!(gguf.tensor_names().collect::<Vec<_>>(), ["a", "b"]);
    let a = gguf.tensor("a").unwrap();
    assert_eq!((a.shape, a.storage), (&[2, 3][..], Storage::F32));
    assert_eq!(a.to_f32().unwrap(), [1.0, -2.0, 3.5, 0.25, 5.0, 6.0]);
    let b = gguf.tensor("b").unwrap();
    assert_eq!((b.shape, b.storage, b.data), (&[1, 32][..], Storage::Q4_1, &(0..20).collect::<Vec<u8>>()[..]));
    assert_eq!(gguf.tensor_bytes("b").unwrap(), b.data);
    assert_eq!(b.to_f32().unwrap_err().to_string(), "Q4_1 is not a plain number format");
}

#[test]
fn another_alignment_moves_the_data() {
    let mut builder = small().meta("general.alignment", &Value::Uint(256));
    builder.alignment = 256;
    let gguf = Gguf::from_bytes(builder.bytes()).unwrap();
    assert_eq!(gguf.tensor("b").unwrap().data, (0..20).collect::<Vec<u8>>());
}

#[test]
fn magic_version_and_counts_are_checked() {
    assert_eq!(refusal_of(vec![]), "gguf header: the magic number needs 4 bytes, 0 are left");
    assert_eq!(refusal_of(b"GGML0000".to_vec()), "not a gguf file: it does not start with GGUF");
    assert_eq!(refusal(&Builder { version: 1, ..small() }), "gguf version 1 is not supported, only 2 and 3 are");
    assert_eq!(
        refusal(&Builder { n_tensors: Some(u64::MAX), ..small() }),
        "gguf header: 18446744073709551615 tensors are above the limit of 65536"
    );
    assert_eq!(
        refusal(&Builder { n_values: Some(65_537), ..small() }),
        "gguf header: 65537 metadata values are above the limit of 65536"
    );
}

#[test]
fn metadata_is_checked() {
    let u64s = |numbers: &[u64]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let array = |kind: u32, len: u64| [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let refused = |key: &[u8], kind, payload: &[u8]| refusal(&Builder::default().raw_meta(key, kind, payload));
    assert_eq!(refused(b"k", 13, &[0; 8]), "gguf header: k has the unknown type 13");
    assert_eq!(refused(b"k", 7, &[2]), "gguf header: k is the boolean 2");
    assert_eq!(refused(b"\xff", 0, &[1]), "gguf header: a metadata key is not valid utf-8");
    assert_eq!(refused(b"k", 8, &[&u64s(&[1])[..], b"\xff"].concat()), "gguf header: k is not valid utf-8");
    assert!(refused(b"k", 8, &u64s(&[u64::MAX])).starts_with("gguf header: k needs 18446744073709551615 bytes, "));
    let claim = refused(b"k", 9, &array(8, 1 << 61));
    assert!(claim.starts_with("gguf header: k claims 2305843009213693952 elements; "), "{claim}");
    let five_deep = [array(9, 1), array(9, 1), array(9, 1), array(9, 1), array(0, 1), vec![1]].concat();
    assert_eq!(refused(b"k", 9, &five_deep), "gguf header: k nests arrays deeper than 4");
    let many = [array(0, (4 << 20) + 1), vec![0; (4 << 20) + 1]].concat();
    assert!(refused(b"k", 9, &many).ends_with("and at most 4194304 elements are read"));
    let twice = Builder::default().meta("k", &Value::Uint(1)).meta("k", &Value::Uint(1));
    assert_eq!(refusal(&twice), "gguf header: the key k is there twice");
    for alignment in [0, 3, 1 << 21] {
        assert_eq!(
            refusal(&small().meta("general.alignment", &Value::Uint(alignment))),
            format!("gguf header: general.alignment Uint({alignment}) is not a power of two up to 1048576")
        );
    }
}

#[test]
fn tensors_are_checked() {
    let one = |change: fn(&mut crate::support::gguf::Tensor)| refusal(&small().with(change));
    assert_eq!(one(|t| t.dims = vec![]), "tensor b has 0 dimensions, not 1 to 4");
    assert_eq!(one(|t| t.dims = vec![32; 5]), "tensor b has 5 dimensions, not 1 to 4");
    assert_eq!(one(|t| t.dims = vec![33]), "tensor b: dimensions [33] cannot be stored as Q4_1");
    assert_eq!(one(|t| t.dims = vec![32, 0]), "tensor b: dimensions [32, 0] cannot be stored as Q4_1");
    let huge = one(|t| t.dims = vec![1 << 32, 1 << 32]);
    assert_eq!(huge, "tensor b: dimensions [4294967296, 4294967296] cannot be stored as Q4_1");
    // The product fits into 64 bits, but not the bytes.
    let large = one(|t| (t.dims, t.kind) = (vec![1 << 61], 0));
    assert_eq!(large, "tensor b: dimensions [2305843009213693952] cannot be stored as F32");
    assert_eq!(one(|t| t.kind = 10), "tensor b is stored as Q2_K, which is not supported");
    assert_eq!(one(|t| t.kind = 77), "tensor b is stored as the unknown type 77, which is not supported");
    assert_eq!(one(|t| t.name = b"a".to_vec()), "tensor a is there twice");
    assert_eq!(one(|t| t.name = vec![0xc3]), "gguf header: a tensor's name is not valid utf-8");
    assert_eq!(one(|t| t.offset = Some(16)), "tensor b: offset 16 is not a multiple of 32");
    assert_eq!(one(|t| t.offset = Some(0)), "tensors b and a overlap");
    let outside = one(|t| t.offset = Some(u64::MAX - 31));
    assert!(outside.starts_with("tensor b: 20 bytes at offset 18446744073709551584 lie outside"), "{outside}");
}

#[test]
fn every_truncation_is_refused() {
    let whole = small().bytes();
    // The tensors end before the padding of the last one.
    let needed = whole.len() - 12;
    assert!(Gguf::from_bytes(whole[..needed].to_vec()).is_ok());
    for keep in 0..needed {
        assert!(Gguf::from_bytes(whole[..keep].to_vec()).is_err(), "{keep} of {} bytes", whole.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn spoilt_files_never_panic(damage in damage()) {
        if let Ok(gguf) = Gguf::from_bytes(damage.apply(&small().bytes())) {
            for name in gguf.tensor_names() {
                let tensor = gguf.tensor(name).unwrap();
                let blocks = tensor.shape.iter().product::<usize>() / tensor.storage.block_len();
                prop_assert_eq!(tensor.data.len(), blocks * tensor.storage.block_bytes());
            }
        }
    }
}
