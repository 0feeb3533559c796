//! Reads the little-endian fields of a GGUF header; every read is checked against what is left.

use super::{FormatError, Value};

/// Elements of all arrays together: four times the largest vocabulary with its merges, scores and types.
const MAX_ELEMENTS: u64 = 4 << 20;
/// Arrays of arrays exist in the format; deeper than this nothing sane writes.
const MAX_DEPTH: usize = 4;

pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    elements: u64,
}

impl<'a> Cursor<'a> {
    /// `bytes` is the part of the file that a header may fill.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0, elements: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8], FormatError> {
        let end = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n)).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            let left = self.remaining();
            return Err(FormatError::Invalid(format!("gguf header: {what} needs {n} bytes, {left} are left")));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N], FormatError> {
        let mut fixed = [0; N];
        fixed.copy_from_slice(self.take(N as u64, what)?);
        Ok(fixed)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.fixed(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.fixed(what)?))
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String, FormatError> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(FormatError::Invalid(format!("gguf header: {what} is not valid utf-8"))),
        }
    }

    /// A value with its type in front.
    pub(super) fn value(&mut self, key: &str) -> Result<Value, FormatError> {
        let kind = self.u32(key)?;
        self.value_of(kind, key, 0)
    }

    fn value_of(&mut self, kind: u32, key: &str, depth: usize) -> Result<Value, FormatError> {
        Ok(match kind {
            0 => Value::Uint(u8::from_le_bytes(self.fixed(key)?).into()),
            1 => Value::Int(i8::from_le_bytes(self.fixed(key)?).into()),
            2 => Value::Uint(u16::from_le_bytes(self.fixed(key)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.fixed(key)?).into()),
            4 => Value::Uint(self.u32(key)?.into()),
            5 => Value::Int(i32::from_le_bytes(self.fixed(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.fixed(key)?).into()),
            7 => match self.fixed::<1>(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(FormatError::Invalid(format!("gguf header: {key} is the boolean {other}"))),
            },
            8 => Value::String(self.string(key)?),
            9 => self.array(key, depth)?,
            10 => Value::Uint(self.u64(key)?),
            11 => Value::Int(i64::from_le_bytes(self.fixed(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.fixed(key)?)),
            other => return Err(FormatError::Invalid(format!("gguf header: {key} has the unknown type {other}"))),
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Value, FormatError> {
        if depth == MAX_DEPTH {
            return Err(FormatError::Invalid(format!("gguf header: {key} nests arrays deeper than {MAX_DEPTH}")));
        }
        let kind = self.u32(key)?;
        let len = self.u64(key)?;
        // Checked before anything is reserved: what is claimed has to fit into the bytes that are left.
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            _ => 12,
        };
        let fits = len.checked_mul(least).is_some_and(|bytes| bytes <= self.remaining() as u64);
        self.elements = self.elements.saturating_add(len);
        if !fits || self.elements > MAX_ELEMENTS {
            let left = self.remaining();
            return Err(FormatError::Invalid(format!(
                "gguf header: {key} claims {len} elements; {left} bytes are left and at most {MAX_ELEMENTS} elements are read"
            )));
        }
        let mut values = Vec::with_capacity(len as usize);
        for _ in 0..len {
            values.push(self.value_of(kind, key, depth + 1)?);
        }
        Ok(Value::Array(values))
    }
}
