//! The JSON header of a safetensors file, checked against the bytes behind it.

use std::{collections::BTreeMap, fmt};

use indexmap::IndexMap;
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

use crate::formats::{FormatError, Storage};

const MAX_DIMS: usize = 8;

/// Where a tensor lies, from the end of the header.
pub(super) struct Span {
    pub(super) shape: Vec<usize>,
    pub(super) storage: Storage,
    pub(super) start: usize,
    pub(super) end: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// `data_len` is the number of bytes after the header; the tensors have to fill it without gap or overlap.
pub(super) fn parse(json: &[u8], data_len: usize) -> Result<IndexMap<String, Span>, FormatError> {
    let Entries(entries) = serde_json::from_slice(json)
        .map_err(|error| FormatError::Invalid(format!("safetensors: the header is not valid: {error}")))?;
    let mut spans = IndexMap::with_capacity(entries.len());
    for (name, entry) in entries {
        let span = check(&name, &entry, data_len)?;
        spans.insert(name, span);
    }
    check_cover(&spans, data_len)?;
    Ok(spans)
}

fn check(name: &str, entry: &Entry, data_len: usize) -> Result<Span, FormatError> {
    let invalid = |what: String| FormatError::Invalid(format!("tensor {name}: {what}"));
    let storage = match entry.dtype.as_str() {
        "F32" => Storage::F32,
        "F16" => Storage::F16,
        "BF16" => Storage::BF16,
        other => return Err(invalid(format!("dtype {other} is not supported, only F32, F16 and BF16 are"))),
    };
    if entry.shape.len() > MAX_DIMS {
        return Err(invalid(format!("{} dimensions are above the limit of {MAX_DIMS}", entry.shape.len())));
    }
    // A dimension may be zero, but the others have to be sane even then.
    let product = entry.shape.iter().try_fold(1u64, |product, d| product.checked_mul((*d).max(1)));
    let size = product.and_then(|n| n.checked_mul(8)).filter(|n| isize::try_from(*n).is_ok());
    if size.is_none() {
        return Err(invalid(format!("shape {:?} is too large", entry.shape)));
    }
    let bytes = entry.shape.iter().product::<u64>() * storage.block_bytes() as u64;
    let (start, end) = entry.data_offsets;
    if start > end || end > data_len as u64 {
        return Err(invalid(format!("bytes {start} to {end} lie outside the {data_len} bytes of data")));
    }
    if end - start != bytes {
        let (dtype, shape) = (&entry.dtype, &entry.shape);
        return Err(invalid(format!("{} bytes are given, {dtype} {shape:?} needs {bytes}", end - start)));
    }
    let shape = entry.shape.iter().map(|d| *d as usize).collect();
    Ok(Span { shape, storage, start: start as usize, end: end as usize })
}

fn check_cover(spans: &IndexMap<String, Span>, data_len: usize) -> Result<(), FormatError> {
    let mut order: Vec<_> = spans.iter().map(|(name, span)| (span.start, span.end, name)).collect();
    order.sort_unstable();
    let mut at = 0;
    for (start, end, name) in order {
        if start != at {
            let what = if start < at { "overlaps another tensor" } else { "leaves a gap before it" };
            return Err(FormatError::Invalid(format!("tensor {name} at byte {start} {what}")));
        }
        at = end;
    }
    if at != data_len {
        return Err(FormatError::Invalid(format!("safetensors: {} bytes after the last tensor", data_len - at)));
    }
    Ok(())
}

/// The header's map, refusing what serde_json would let the last one win: a name that is there twice.
struct Entries(IndexMap<String, Entry>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = IndexMap::new();
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<BTreeMap<String, String>>()?;
                if std::mem::replace(&mut has_metadata, true) {
                    return Err(A::Error::custom("__metadata__ is there twice"));
                }
                continue;
            }
            let entry = map.next_value::<Entry>()?;
            if entries.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor {name} is there twice")));
            }
            entries.insert(name, entry);
        }
        Ok(Entries(entries))
    }
}
