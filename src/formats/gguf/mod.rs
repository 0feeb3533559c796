//! GGUF headers (version 2 and 3), validated, over a memory map.
//!
//! Everything a header claims is checked before it is believed: counts and lengths against the bytes that are
//! left, products and offsets with checked arithmetic, tensors against the end of the file and each other.

mod cursor;
pub mod write;

use std::{ops::Range, path::Path};

use bytes::Bytes;
use indexmap::IndexMap;

use self::cursor::Cursor;
use super::{FormatError, Storage, TensorView, bytes::map};

/// Metadata and the table of tensors together.
const MAX_HEADER: usize = 64 << 20;
const MAX_ENTRIES: u64 = 65_536;
const MAX_ALIGNMENT: u64 = 1 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;
/// GGUF's number for the type of a string.
const STRING: u32 = 8;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Uint(u64),
    Int(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

/// An opened file: its metadata and tensors are in bounds, aligned and known.
pub struct Gguf {
    pub metadata: IndexMap<String, Value>,
    tensors: IndexMap<String, Entry>,
    /// Where each value's type and bytes lie.
    raw: IndexMap<String, Range<usize>>,
    bytes: Bytes,
}

/// Where a tensor lies, from the start of the file.
struct Entry {
    shape: Vec<usize>,
    storage: Storage,
    start: usize,
    end: usize,
}

impl Gguf {
    /// Maps a file and checks its header.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        Self::parse(map(path)?).map_err(|error| error.in_file(path))
    }

    /// A file that is in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, FormatError> {
        Self::parse(bytes.into())
    }

    fn parse(bytes: Bytes) -> Result<Self, FormatError> {
        let mut cursor = Cursor::new(&bytes[..bytes.len().min(MAX_HEADER)]);
        let magic = cursor.u32("the magic number")?;
        if magic.to_le_bytes() != *b"GGUF" {
            return Err(FormatError::Invalid("not a gguf file: it does not start with GGUF".to_owned()));
        }
        let version = cursor.u32("the version")?;
        if !matches!(version, 2 | 3) {
            return Err(FormatError::Invalid(format!("gguf version {version} is not supported, only 2 and 3 are")));
        }
        let n_tensors = count(&mut cursor, "tensors")?;
        let n_values = count(&mut cursor, "metadata values")?;
        let (metadata, raw) = read_metadata(&mut cursor, n_values)?;
        let align = alignment(&metadata)?;
        let tensors = read_tensors(&mut cursor, n_tensors, align, bytes.len())?;
        check_overlap(&tensors)?;
        Ok(Gguf { metadata, tensors, raw, bytes })
    }

    /// One tensor, by its name in the file.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let entry = self.tensors.get(name)?;
        Some(TensorView { shape: &entry.shape, storage: entry.storage, data: &self.bytes[entry.start..entry.end] })
    }

    /// The tensor's bytes, kept alive with the file.
    pub fn tensor_bytes(&self, name: &str) -> Option<Bytes> {
        self.tensors.get(name).map(|entry| self.bytes.slice(entry.start..entry.end))
    }

    /// Names in the order of the file.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A metadata string; none if the key is missing or something else.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// A metadata integer that is not negative, of any width.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.metadata.get(key)?.as_u64()
    }

    /// A metadata number.
    pub fn f64(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            Value::Float(x) => Some(*x),
            Value::Uint(n) => Some(*n as f64),
            Value::Int(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// A metadata boolean.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// A metadata array.
    pub fn array(&self, key: &str) -> Option<&[Value]> {
        match self.metadata.get(key)? {
            Value::Array(values) => Some(values),
            _ => None,
        }
    }
}

impl Value {
    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// An integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Uint(n) => Some(*n),
            Value::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A floating-point number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Float(x) => Some(*x),
            _ => None,
        }
    }
}

fn count(cursor: &mut Cursor, what: &str) -> Result<u64, FormatError> {
    let n = cursor.u64(what)?;
    if n > MAX_ENTRIES {
        return Err(FormatError::Invalid(format!("gguf header: {n} {what} are above the limit of {MAX_ENTRIES}")));
    }
    Ok(n)
}

type Found = (IndexMap<String, Value>, IndexMap<String, Range<usize>>);

/// The values, and where each lies.
fn read_metadata(cursor: &mut Cursor, n: u64) -> Result<Found, FormatError> {
    let (mut metadata, mut raw) = (IndexMap::new(), IndexMap::new());
    for _ in 0..n {
        let key = cursor.string("a metadata key")?;
        let start = cursor.position();
        let value = cursor.value(&key)?;
        if metadata.contains_key(&key) {
            return Err(FormatError::Invalid(format!("gguf header: the key {key} is there twice")));
        }
        raw.insert(key.clone(), start..cursor.position());
        metadata.insert(key, value);
    }
    Ok((metadata, raw))
}

fn alignment(metadata: &IndexMap<String, Value>) -> Result<u64, FormatError> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u64() {
        Some(n) if n.is_power_of_two() && n <= MAX_ALIGNMENT => Ok(n),
        _ => Err(FormatError::Invalid(format!(
            "gguf header: general.alignment {value:?} is not a power of two up to {MAX_ALIGNMENT}"
        ))),
    }
}

/// What the table of tensors says of one, before offsets are resolved.
struct Claim {
    shape: Vec<usize>,
    storage: Storage,
    bytes: u64,
    offset: u64,
}

fn read_tensors(
    cursor: &mut Cursor,
    n: u64,
    align: u64,
    file_len: usize,
) -> Result<IndexMap<String, Entry>, FormatError> {
    let mut claims = IndexMap::new();
    for _ in 0..n {
        let name = cursor.string("a tensor's name")?;
        let claim = read_claim(cursor, &name)?;
        if claims.contains_key(&name) {
            return Err(FormatError::Invalid(format!("tensor {name} is there twice")));
        }
        claims.insert(name, claim);
    }
    let data_start = (cursor.position() as u64).next_multiple_of(align);
    let mut tensors = IndexMap::new();
    for (name, claim) in claims {
        if !claim.offset.is_multiple_of(align) {
            let offset = claim.offset;
            return Err(FormatError::Invalid(format!("tensor {name}: offset {offset} is not a multiple of {align}")));
        }
        let start = data_start.checked_add(claim.offset);
        let end = start.and_then(|start| start.checked_add(claim.bytes)).filter(|end| *end <= file_len as u64);
        let (Some(start), Some(end)) = (start, end) else {
            return Err(FormatError::Invalid(format!(
                "tensor {name}: {} bytes at offset {} lie outside the file of {file_len} bytes",
                claim.bytes, claim.offset
            )));
        };
        // Both are at most file_len, which is a usize.
        let entry = Entry { shape: claim.shape, storage: claim.storage, start: start as usize, end: end as usize };
        tensors.insert(name, entry);
    }
    Ok(tensors)
}

fn read_claim(cursor: &mut Cursor, name: &str) -> Result<Claim, FormatError> {
    let n_dims = cursor.u32(name)?;
    if !(1..=4).contains(&n_dims) {
        return Err(FormatError::Invalid(format!("tensor {name} has {n_dims} dimensions, not 1 to 4")));
    }
    let mut dims = Vec::new();
    for _ in 0..n_dims {
        dims.push(cursor.u64(name)?);
    }
    let kind = cursor.u32(name)?;
    let Some(storage) = storage_of(kind) else {
        let known = name_of(kind);
        return Err(FormatError::Invalid(format!("tensor {name} is stored as {known}, which is not supported")));
    };
    let offset = cursor.u64(name)?;
    let bytes = byte_len(&dims, storage).ok_or_else(|| {
        let storage = storage.name();
        FormatError::Invalid(format!("tensor {name}: dimensions {dims:?} cannot be stored as {storage}"))
    })?;
    // byte_len has shown that the product, and so each of them, fits.
    let shape = dims.iter().rev().map(|d| *d as usize).collect();
    Ok(Claim { shape, storage, bytes, offset })
}

/// The bytes of a tensor; none when a dimension is zero, a row is not whole blocks, or the size overflows.
fn byte_len(dims: &[u64], storage: Storage) -> Option<u64> {
    if dims.contains(&0) || !dims.first()?.is_multiple_of(storage.block_len() as u64) {
        return None;
    }
    let elements = dims.iter().try_fold(1u64, |product, d| product.checked_mul(*d))?;
    // Later arithmetic on element counts, such as times four for f32, must not overflow either.
    elements.checked_mul(8).filter(|n| isize::try_from(*n).is_ok())?;
    (elements / storage.block_len() as u64).checked_mul(storage.block_bytes() as u64)
}

fn check_overlap(tensors: &IndexMap<String, Entry>) -> Result<(), FormatError> {
    let mut spans: Vec<_> = tensors.iter().map(|(name, entry)| (entry.start, entry.end, name)).collect();
    spans.sort_unstable();
    for pair in spans.windows(2) {
        let ((_, end, first), (start, _, second)) = (pair[0], pair[1]);
        if start < end {
            return Err(FormatError::Invalid(format!("tensors {first} and {second} overlap")));
        }
    }
    Ok(())
}

fn storage_of(ggml_type: u32) -> Option<Storage> {
    Some(match ggml_type {
        0 => Storage::F32,
        1 => Storage::F16,
        2 => Storage::Q4_0,
        3 => Storage::Q4_1,
        6 => Storage::Q5_0,
        7 => Storage::Q5_1,
        8 => Storage::Q8_0,
        12 => Storage::Q4K,
        13 => Storage::Q5K,
        14 => Storage::Q6K,
        30 => Storage::BF16,
        _ => return None,
    })
}

/// The number of a type in files; none for what they cannot hold.
fn ggml_type(storage: Storage) -> Option<u32> {
    (0..=30).find(|kind| storage_of(*kind) == Some(storage))
}

/// The name of a type that we do not read.
fn name_of(ggml_type: u32) -> String {
    let name = match ggml_type {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return format!("the unknown type {other}"),
    };
    name.to_owned()
}
