use attune::formats::{
    Storage,
    safetensors::{Safetensors, write},
};
use proptest::prelude::*;

use super::damage;

/// A file with this header over this many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let data = (0..data).map(|i| i as u8).collect::<Vec<u8>>();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

fn refusal(bytes: Vec<u8>) -> String {
    match Safetensors::of(&bytes) {
        Ok(_) => panic!("the file was accepted"),
        Err(error) => error.to_string(),
    }
}

fn small() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]},
        "a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"none":{"dtype":"F16","shape":[0,7],"data_offsets":[28,28]}}"#;
    file(header, 28)
}

#[test]
fn tensors_come_back() {
    let bytes = small();
    let tensors = Safetensors::of(&bytes).unwrap();
    assert_eq!(tensors.names().collect::<Vec<_>>(), ["b", "a", "none"]);
    let b = tensors.tensor("b").unwrap();
    assert_eq!((b.shape, b.storage, b.data), (&[2][..], Storage::BF16, &[24, 25, 26, 27][..]));
    assert_eq!(tensors.tensor("a").unwrap().data.len(), 24);
    assert_eq!(tensors.tensor("none").unwrap().shape, [0, 7]);
    assert!(tensors.tensor("c").is_none());
}

#[test]
fn what_is_written_is_read_by_us_and_by_the_reference() {
    let tensors = vec![
        ("z".to_owned(), vec![2, 2], vec![1.0, -2.5, f32::MIN_POSITIVE, 4.0]),
        ("a".to_owned(), vec![3], vec![0.1, 0.2, 0.3]),
    ];
    let bytes = write(&tensors);
    assert_eq!(bytes, write(&tensors));
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ours = Safetensors::of(&bytes).unwrap();
    assert_eq!(ours.names().collect::<Vec<_>>(), ["z", "a"]);
    for (name, shape, values) in &tensors {
        let tensor = ours.tensor(name).unwrap();
        assert_eq!((tensor.shape, tensor.to_f32().unwrap()), (&shape[..], values.clone()));
        assert_eq!(
            (theirs.tensor(name).unwrap().shape(), theirs.tensor(name).unwrap().data()),
            (&shape[..], tensor.data)
        );
    }
}

#[test]
fn the_header_is_checked() {
    assert_eq!(refusal(vec![0; 7]), "safetensors: 7 bytes are too few for a header");
    let bloated = [&(17u64 << 20).to_le_bytes()[..], &[b' '; 100]].concat();
    assert_eq!(refusal(bloated), "safetensors: a header of 17825792 bytes is above the limit of 16777216");
    let huge = [u64::MAX.to_le_bytes(), *b"{}      "].concat();
    assert!(refusal(huge).starts_with("safetensors: a header of 18446744073709551615 bytes is above"));
    let short = [&100u64.to_le_bytes()[..], b"{}"].concat();
    assert_eq!(refusal(short), "safetensors: the header claims 100 bytes, 2 are left");
    for (header, part) in [
        ("[]", "expected an object of tensors"),
        ("{", "EOF while parsing"),
        ("{\"\u{fe}\":1}", "invalid type: integer `1`"),
        (r#"{"__metadata__":{"a":1}}"#, "expected a string"),
        (r#"{"a":{"dtype":"F32","shape":[1]}}"#, "missing field `data_offsets`"),
        (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, "invalid value: integer `-1`"),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":0}}"#, "unknown field `x`"),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            "tensor a is there twice",
        ),
        (r#"{"__metadata__":{},"__metadata__":{}}"#, "__metadata__ is there twice"),
    ] {
        let message = refusal(file(header, 8));
        assert!(message.starts_with("safetensors: the header is not valid: "), "{message}");
        assert!(message.contains(part), "{message}");
    }
    assert!(refusal([&2u64.to_le_bytes()[..], b"\xff\xfe"].concat()).contains("header is not valid"));
}

#[test]
fn tensors_are_checked() {
    let entry = |name: &str, dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{from},{to}]}}"#)
    };
    let refused = |entries: &[String], data| refusal(file(&format!("{{{}}}", entries.join(",")), data));
    let one = |dtype, shape, from, to| refused(&[entry("a", dtype, shape, from, to)], 16);
    assert_eq!(one("I64", "2", 0, 16), "tensor a: dtype I64 is not supported, only F32, F16 and BF16 are");
    assert_eq!(one("F32", "5", 0, 16), "tensor a: 16 bytes are given, F32 [5] needs 20");
    assert_eq!(one("F32", "6", 0, 24), "tensor a: bytes 0 to 24 lie outside the 16 bytes of data");
    assert_eq!(one("F32", "4", 16, 0), "tensor a: bytes 16 to 0 lie outside the 16 bytes of data");
    assert_eq!(one("F32", "1,1,1,1,1,1,1,1,4", 0, 16), "tensor a: 9 dimensions are above the limit of 8");
    let wrapping = one("F32", "4294967296,4294967296", 0, 0);
    assert_eq!(wrapping, "tensor a: shape [4294967296, 4294967296] is too large");
    let behind_zero = one("F32", "0,4294967296,4294967296", 0, 0);
    assert_eq!(behind_zero, "tensor a: shape [0, 4294967296, 4294967296] is too large");
    assert_eq!(one("F32", "3", 0, 12), "safetensors: 4 bytes after the last tensor");
    assert_eq!(one("F32", "3", 4, 16), "tensor a at byte 4 leaves a gap before it");
    let pair = |from, to, shape| refused(&[entry("a", "F32", "2", 0, 8), entry("b", "F32", shape, from, to)], 16);
    assert_eq!(pair(4, 16, "3"), "tensor b at byte 4 overlaps another tensor");
    assert_eq!(pair(12, 16, "1"), "tensor b at byte 12 leaves a gap before it");
}

#[test]
fn every_truncation_is_refused() {
    let whole = small();
    for keep in 0..whole.len() {
        assert!(Safetensors::of(&whole[..keep]).is_err(), "{keep} of {} bytes", whole.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn spoilt_files_never_panic(damage in damage()) {
        let spoilt = damage.apply(&small());
        if let Ok(tensors) = Safetensors::of(&spoilt) {
            for name in tensors.names() {
                let tensor = tensors.tensor(name).unwrap();
                let bytes = tensor.shape.iter().product::<usize>() * tensor.storage.block_bytes();
                prop_assert_eq!(tensor.data.len(), bytes);
                prop_assert!(tensor.to_f32().is_ok());
            }
        }
    }
}
