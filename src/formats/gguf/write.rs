//! GGUF files (version 3), written.

use super::{DEFAULT_ALIGNMENT, Gguf, STRING, Storage, ggml_type};

/// Metadata in the order of the file, each value as it is written: GGUF's number of its type, then its bytes.
#[derive(Clone, Debug, Default)]
pub struct Metadata(Vec<(String, Vec<u8>)>);

impl Metadata {
    /// All that a file says, to the byte. Tensors are aligned anew, and the parts of a split file are one.
    pub fn of(gguf: &Gguf) -> Self {
        let is_own = |key: &str| key != "general.alignment" && !key.starts_with("split.");
        let raw = |(key, span): (&String, &std::ops::Range<usize>)| (key.clone(), gguf.bytes[span.clone()].to_vec());
        Self(gguf.raw.iter().filter(|(key, _)| is_own(key)).map(raw).collect())
    }

    pub fn set_u32(&mut self, key: &str, value: u32) {
        self.set(key, 4, &value.to_le_bytes());
    }

    pub fn set_f32(&mut self, key: &str, value: f32) {
        self.set(key, 6, &value.to_le_bytes());
    }

    pub fn set_str(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        string(&mut bytes, value);
        self.set(key, STRING, &bytes);
    }

    fn set(&mut self, key: &str, kind: u32, bytes: &[u8]) {
        let value = [&kind.to_le_bytes(), bytes].concat();
        match self.0.iter_mut().find(|(known, _)| known == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key.to_owned(), value)),
        }
    }
}

/// A tensor to be written.
pub struct Tensor {
    pub name: String,
    /// Outermost first, as in `TensorView`.
    pub shape: Vec<usize>,
    pub storage: Storage,
    pub data: Vec<u8>,
}

/// A whole file. None where a tensor is held in a way that GGUF has no number for (NF4).
pub fn write(metadata: &Metadata, tensors: &[Tensor]) -> Option<Vec<u8>> {
    let align = DEFAULT_ALIGNMENT as usize;
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.0.len() as u64).to_le_bytes());
    for (key, value) in &metadata.0 {
        string(&mut out, key);
        out.extend(value);
    }
    let mut offset = 0;
    for tensor in tensors {
        string(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|n| out.extend((*n as u64).to_le_bytes()));
        out.extend(ggml_type(tensor.storage)?.to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset = (offset + tensor.data.len()).next_multiple_of(align);
    }
    out.resize(out.len().next_multiple_of(align), 0);
    out.reserve(offset);
    for tensor in tensors {
        out.extend(&tensor.data);
        out.resize(out.len().next_multiple_of(align), 0);
    }
    Some(out)
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
