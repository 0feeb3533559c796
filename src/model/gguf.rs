//! How llama.cpp's files name and order what Hugging Face's have, and a base's tensors written as such a file.

use std::path::PathBuf;

use candle_core::{
    Device, Result as Candle, Tensor,
    quantized::{GgmlDType, QTensor},
};
use half::{bf16, f16};

use super::{Base, Held, ModelError, dense::FAMILIES, load};
use crate::{
    domain::Site,
    formats::{
        Storage,
        gguf::{
            Gguf,
            write::{self, Metadata},
        },
    },
};

/// A base's file, and how it is held in memory.
pub(super) struct Origin {
    pub path: PathBuf,
    pub held: Held,
}

/// How a written file stores its matrices. Norms and biases are F32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outtype {
    F32,
    F16,
    Bf16,
    Q8_0,
    /// Each as in the base's own file.
    Base,
}

impl Outtype {
    /// By the names that llama.cpp's converter has for them.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "f32" => Self::F32,
            "f16" => Self::F16,
            "bf16" => Self::Bf16,
            "q8_0" => Self::Q8_0,
            "base" => Self::Base,
            _ => return None,
        })
    }

    fn storage(self, of_base: Storage) -> Storage {
        match self {
            Self::F32 => Storage::F32,
            Self::F16 => Storage::F16,
            Self::Bf16 => Storage::BF16,
            Self::Q8_0 => Storage::Q8_0,
            Self::Base => of_base,
        }
    }

    /// `general.file_type`; none where the file's own stays.
    fn file_type(self) -> Option<u32> {
        match self {
            Self::F32 => Some(0),
            Self::F16 => Some(1),
            Self::Bf16 => Some(32),
            Self::Q8_0 => Some(7),
            Self::Base => None,
        }
    }
}

/// `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`. Families differ in what a name means, which the other
/// tensors of the file tell.
pub fn name(hf: &str, has: impl Fn(&str) -> bool) -> Option<String> {
    let (module, kind) = hf.rsplit_once('.')?;
    let short = match module {
        "model.embed_tokens" => "token_embd".to_owned(),
        "model.norm" => "output_norm".to_owned(),
        "lm_head" => "output".to_owned(),
        _ => {
            let (layer, module) = module.strip_prefix("model.layers.")?.split_once('.')?;
            let lacks = |module: &str| !has(&format!("blk.{layer}.{module}.weight"));
            let short = match module {
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "self_attn.q_norm" => "attn_q_norm",
                "self_attn.k_norm" => "attn_k_norm",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                "self_attn.qkv_proj" => "attn_qkv",
                // Without a gate of its own, it holds the gate too.
                "mlp.gate_up_proj" if lacks("ffn_gate") => "ffn_up",
                "input_layernorm" => "attn_norm",
                "pre_feedforward_layernorm" => "ffn_norm",
                "post_feedforward_layernorm" => "post_ffw_norm",
                // Gemma's stands behind the attention, the others' before the feed-forward block.
                "post_attention_layernorm" if lacks("post_attention_norm") => "ffn_norm",
                "post_attention_layernorm" => "post_attention_norm",
                _ => return None,
            };
            format!("blk.{layer}.{short}")
        }
    };
    Some(format!("{short}.{kind}"))
}

/// The stored row of each row in Hugging Face order: inside a head, stored row `2i + h` is half `h`'s row `i`.
pub fn halves_order(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let head = rows / heads;
    (0..rows).map(move |row| {
        let (start, at) = (row / head * head, row % head);
        let (half, i) = (at / (head / 2), at % (head / 2));
        start + 2 * i + half
    })
}

/// Heads whose rows llama.cpp stores pair by pair.
pub fn paired_heads(site: Site, heads: usize, kv_heads: usize) -> Option<usize> {
    match site {
        Site::Q => Some(heads),
        Site::K => Some(kv_heads),
        _ => None,
    }
}

/// Whether files of this `general.architecture` have paired rows.
pub fn is_paired(architecture: &str) -> bool {
    architecture == "llama"
}

impl Base {
    /// `general.architecture` of its family's files, where a linear of the model is one of the file.
    pub fn gguf_architecture(&self) -> std::result::Result<&str, String> {
        match self.info.architecture.as_str() {
            // Without a name of its own there.
            "mistral" => Ok("llama"),
            family if FAMILIES.contains(&family) => Ok(family),
            family => Err(format!("the family {family} cannot be written as a gguf file yet")),
        }
    }

    /// Rows in Hugging Face order as the base's files have them.
    pub fn gguf_rows(&self, site: Site, rows: &Tensor) -> Candle<Tensor> {
        let is_paired = self.gguf_architecture().is_ok_and(is_paired);
        let heads = paired_heads(site, self.info.heads, self.info.kv_heads).filter(|_| is_paired);
        let Some(heads) = heads else { return Ok(rows.clone()) };
        let n = rows.dim(0)?;
        let mut from = vec![0u32; n];
        for (row, stored) in halves_order(n, heads).enumerate() {
            from[stored] = row as u32;
        }
        rows.index_select(&Tensor::new(from, &Device::Cpu)?, 0)
    }

    /// The file that the base was read from.
    fn gguf(&self) -> std::result::Result<Gguf, String> {
        let Some(Origin { path, held }) = self.origin.as_deref() else {
            let message = "the base was read from a directory: merge to safetensors, which llama.cpp's converter reads";
            return Err(message.to_owned());
        };
        let same = load::hash_file(path).map(|hash| held.hash(hash) == self.info.hash);
        match same.map_err(|error| error.to_string())? {
            true => Gguf::open(path).map_err(|error| error.to_string()),
            false => Err("the base's file has changed since it was read".to_owned()),
        }
    }
}

/// A model's tensors on their way into a file like the base's.
pub struct Writer<'a> {
    base: &'a Base,
    source: Gguf,
    outtype: Outtype,
    tensors: Vec<write::Tensor>,
}

impl<'a> Writer<'a> {
    /// Why there can be none, as text.
    pub fn new(base: &'a Base, outtype: Outtype) -> std::result::Result<Self, String> {
        base.gguf_architecture()?;
        let is_as_stored = base.origin.as_ref().is_none_or(|origin| origin.held == Held::AsStored);
        if outtype == Outtype::Base && !is_as_stored {
            return Err(format!("the base is held in {}, which gguf files do not have", base.info.storage));
        }
        Ok(Self { base, source: base.gguf()?, outtype, tensors: Vec::new() })
    }

    /// One tensor by its Hugging Face name.
    pub fn push(&mut self, hf: &str, tensor: &Tensor) -> std::result::Result<(), ModelError> {
        let has = |name: &str| self.source.tensor(name).is_some();
        let Some(name) = name(hf, has) else {
            return Err(ModelError::Unsupported(format!("{hf} has no name in gguf files")));
        };
        let site = Site::LAYER.into_iter().find(|site| hf.contains(&format!(".{}.", site.module())));
        let tensor = site.map_or(Ok(tensor.clone()), |site| self.base.gguf_rows(site, tensor))?;
        // An output layer that was the embedding is stored as that was.
        let of_base = self.source.tensor(&name).or_else(|| self.source.tensor("token_embd.weight"));
        let of_base = of_base.map_or(Storage::F32, |view| view.storage);
        let storage = if tensor.rank() == 1 { Storage::F32 } else { self.outtype.storage(of_base) };
        let data = encode(storage, &tensor)?;
        self.tensors.push(write::Tensor { name, shape: tensor.dims().to_vec(), storage, data });
        Ok(())
    }

    /// The file: the base's metadata, tokenizer and all, and what the model's tensors do not replace.
    pub fn finish(mut self) -> std::result::Result<Vec<u8>, ModelError> {
        let mut metadata = Metadata::of(&self.source);
        if let Some(file_type) = self.outtype.file_type() {
            metadata.set_u32("general.file_type", file_type);
            metadata.set_u32("general.quantization_version", 2);
        }
        for name in self.source.tensor_names() {
            let is_written = self.tensors.iter().any(|tensor| tensor.name == name);
            if let Some(view) = self.source.tensor(name).filter(|_| !is_written) {
                let (shape, storage, data) = (view.shape.to_vec(), view.storage, view.data.to_vec());
                self.tensors.push(write::Tensor { name: name.to_owned(), shape, storage, data });
            }
        }
        write::write(&metadata, &self.tensors)
            .ok_or_else(|| ModelError::Unsupported("gguf files have no NF4".to_owned()))
    }
}

/// Numbers as a file stores them.
pub fn encode(storage: Storage, tensor: &Tensor) -> Candle<Vec<u8>> {
    let dtype = match storage {
        Storage::F32 => return Ok(numbers(tensor)?.iter().flat_map(|x| x.to_le_bytes()).collect()),
        Storage::F16 => return Ok(numbers(tensor)?.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()),
        Storage::BF16 => return Ok(numbers(tensor)?.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()),
        Storage::Q4_0 => GgmlDType::Q4_0,
        Storage::Q4_1 => GgmlDType::Q4_1,
        Storage::Q5_0 => GgmlDType::Q5_0,
        Storage::Q5_1 => GgmlDType::Q5_1,
        Storage::Q8_0 => GgmlDType::Q8_0,
        Storage::Q4K => GgmlDType::Q4K,
        Storage::Q5K => GgmlDType::Q5K,
        Storage::Q6K => GgmlDType::Q6K,
        Storage::NF4 | Storage::NF4DQ => candle_core::bail!("gguf files have no {}", storage.name()),
    };
    Ok(QTensor::quantize(tensor, dtype)?.data()?.into_owned())
}

fn numbers(tensor: &Tensor) -> Candle<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}
