//! safetensors: validated headers over a memory map or bytes, and a writer.

mod header;

use std::{ops::Deref, path::Path};

use bytes::Bytes;
use indexmap::IndexMap;

use self::header::Span;
use super::{FormatError, TensorView, bytes::map};

/// Adapters come from anyone; theirs are small. A checkpoint of the largest mixture of experts (20 000 tensors with
/// their moments) still fits.
const MAX_ADAPTER_HEADER: u64 = 16 << 20;
/// What the format itself allows.
const MAX_MODEL_HEADER: u64 = 100_000_000;

/// One opened file. Dtypes other than F32, F16 and BF16 are refused by name.
pub struct Safetensors<B = Bytes> {
    tensors: IndexMap<String, Span>,
    /// Where the header ends.
    start: usize,
    bytes: B,
}

impl Safetensors {
    /// Maps a model's file and checks its header.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        Self::parse(map(path)?, MAX_MODEL_HEADER).map_err(|error| error.in_file(path))
    }

    /// The tensor's bytes, kept alive with the file.
    pub fn tensor_bytes(&self, name: &str) -> Option<Bytes> {
        self.tensors.get(name).map(|span| self.bytes.slice(self.start + span.start..self.start + span.end))
    }
}

impl<'a> Safetensors<&'a [u8]> {
    /// An adapter's file, in memory.
    pub fn of(bytes: &'a [u8]) -> Result<Self, FormatError> {
        Self::parse(bytes, MAX_ADAPTER_HEADER)
    }
}

impl<B: Deref<Target = [u8]>> Safetensors<B> {
    fn parse(bytes: B, max_header: u64) -> Result<Self, FormatError> {
        let Some((len, rest)) = bytes.split_first_chunk::<8>() else {
            let n = bytes.len();
            return Err(FormatError::Invalid(format!("safetensors: {n} bytes are too few for a header")));
        };
        let len = u64::from_le_bytes(*len);
        if len > max_header {
            return Err(FormatError::Invalid(format!(
                "safetensors: a header of {len} bytes is above the limit of {max_header}"
            )));
        }
        let Some(json) = rest.get(..len as usize) else {
            let left = rest.len();
            return Err(FormatError::Invalid(format!("safetensors: the header claims {len} bytes, {left} are left")));
        };
        let tensors = header::parse(json, rest.len() - json.len())?;
        Ok(Safetensors { tensors, start: 8 + len as usize, bytes })
    }

    /// Names in the order of the header.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// One tensor by name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let span = self.tensors.get(name)?;
        let data = &self.bytes[self.start + span.start..self.start + span.end];
        Some(TensorView { shape: &span.shape, storage: span.storage, data })
    }
}

/// `name`, `shape` and F32 values, written in the order given, with metadata `{"format":"pt"}`.
/// The same tensors give the same bytes.
///
/// # Panics
/// When the values of a tensor are not as many as its shape says: that is the caller's mistake.
pub fn write<V: AsRef<[f32]>>(tensors: &[(String, Vec<usize>, V)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), serde_json::json!({"format": "pt"}));
    let mut end = 0;
    for (name, shape, values) in tensors {
        let values = values.as_ref();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name} has another number of values than {shape:?}");
        let start = end;
        end += 4 * values.len();
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = Vec::with_capacity(8 + json.len() + end);
    bytes.extend((json.len() as u64).to_le_bytes());
    bytes.extend(json);
    for (_, _, values) in tensors {
        for value in values.as_ref() {
            bytes.extend(value.to_le_bytes());
        }
    }
    bytes
}
