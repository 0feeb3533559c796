//! GGUF files made of what a test wants in them. Every field may be set to what no sane writer would write.

use attune::formats::gguf::Value;

pub const F32: u32 = 0;

pub struct Builder {
    pub version: u32,
    /// What the header claims instead of the true counts.
    pub n_tensors: Option<u64>,
    pub n_values: Option<u64>,
    /// Where the data start, and what offsets are padded to.
    pub alignment: usize,
    pub metadata: Vec<Meta>,
    pub tensors: Vec<Tensor>,
}

pub struct Meta {
    pub key: Vec<u8>,
    /// GGUF's number for the type, and the bytes after it.
    pub kind: u32,
    pub payload: Vec<u8>,
}

pub struct Tensor {
    pub name: Vec<u8>,
    /// As in the file: innermost first.
    pub dims: Vec<u64>,
    pub kind: u32,
    /// From the start of the data; after the tensor before it unless given.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

impl Default for Builder {
    fn default() -> Self {
        Builder { version: 3, n_tensors: None, n_values: None, alignment: 32, metadata: vec![], tensors: vec![] }
    }
}

impl Builder {
    /// A metadata value: integers as 32 bits where they fit, floats as f32.
    pub fn meta(mut self, key: &str, value: &Value) -> Self {
        let (kind, payload) = encode(value);
        self.metadata.push(Meta { key: key.into(), kind, payload });
        self
    }

    pub fn raw_meta(mut self, key: &[u8], kind: u32, payload: &[u8]) -> Self {
        self.metadata.push(Meta { key: key.into(), kind, payload: payload.into() });
        self
    }

    /// A tensor; `shape` outermost first, as `TensorView` has it.
    pub fn tensor(mut self, name: &str, shape: &[usize], kind: u32, data: Vec<u8>) -> Self {
        let dims = shape.iter().rev().map(|d| *d as u64).collect();
        self.tensors.push(Tensor { name: name.into(), dims, kind, offset: None, data });
        self
    }

    pub fn f32(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.tensor(name, shape, F32, values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// Changes the tensor that was added last.
    pub fn with(mut self, change: impl FnOnce(&mut Tensor)) -> Self {
        change(self.tensors.last_mut().unwrap());
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_values.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for meta in &self.metadata {
            string(&mut out, &meta.key);
            out.extend(meta.kind.to_le_bytes());
            out.extend(&meta.payload);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            string(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}

fn string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

/// GGUF's number for the type of a value, and its bytes.
fn encode(value: &Value) -> (u32, Vec<u8>) {
    match value {
        Value::Uint(n) => match u32::try_from(*n) {
            Ok(n) => (4, n.to_le_bytes().to_vec()),
            Err(_) => (10, n.to_le_bytes().to_vec()),
        },
        Value::Int(n) => match i32::try_from(*n) {
            Ok(n) => (5, n.to_le_bytes().to_vec()),
            Err(_) => (11, n.to_le_bytes().to_vec()),
        },
        Value::Float(x) => (6, (*x as f32).to_le_bytes().to_vec()),
        Value::Bool(b) => (7, vec![u8::from(*b)]),
        Value::String(text) => {
            let mut out = Vec::new();
            string(&mut out, text.as_bytes());
            (8, out)
        }
        Value::Array(values) => {
            let encoded: Vec<(u32, Vec<u8>)> = values.iter().map(encode).collect();
            let mut out = encoded.first().map_or(0, |(kind, _)| *kind).to_le_bytes().to_vec();
            out.extend((values.len() as u64).to_le_bytes());
            encoded.iter().for_each(|(_, bytes)| out.extend(bytes));
            (9, out)
        }
    }
}
