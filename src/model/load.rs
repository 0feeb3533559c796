//! A base from a GGUF file or a Hugging Face directory.

use std::{fs, path::Path, sync::Arc};

use bytes::Bytes;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    Linear, ModelError,
    config::{ModelConfig, Norms},
    decoder::{Base, Layer, Parts},
    dense,
    gguf::{self, Origin},
    mlp::Mlp,
    ops::Attention,
    weight::{Compute, Weight},
};
use crate::{
    domain::{BaseInfo, Site},
    formats::{FormatError, Storage, TensorView, gguf::Gguf, safetensors::Safetensors},
};

/// Where tensors come from, by their Hugging Face names.
trait Tensors {
    fn view(&self, name: &str) -> Option<(TensorView<'_>, Bytes)>;
    /// Whether q and k rows of a head are stored pair by pair (llama.cpp's order for `llama`).
    fn is_interleaved(&self) -> bool;
}

struct GgufTensors(Gguf);

impl Tensors for GgufTensors {
    fn view(&self, name: &str) -> Option<(TensorView<'_>, Bytes)> {
        let name = gguf::name(name, |name| self.0.tensor(name).is_some())?;
        Some((self.0.tensor(&name)?, self.0.tensor_bytes(&name)?))
    }

    fn is_interleaved(&self) -> bool {
        self.0.str("general.architecture").is_some_and(gguf::is_paired)
    }
}

struct SafetensorsDir(Vec<Safetensors>);

impl Tensors for SafetensorsDir {
    fn view(&self, name: &str) -> Option<(TensorView<'_>, Bytes)> {
        self.0.iter().find_map(|file| Some((file.tensor(name)?, file.tensor_bytes(name)?)))
    }

    fn is_interleaved(&self) -> bool {
        false
    }
}

/// How the linears of the layers are held in memory. Embeddings, norms and the output layer are as stored always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    AsStored,
    /// NF4 made of a dense model at load.
    Nf4,
    /// The same with its scales quantised too.
    Nf4Dq,
}

impl Held {
    fn storage(self) -> Option<Storage> {
        match self {
            Held::AsStored => None,
            Held::Nf4 => Some(Storage::NF4),
            Held::Nf4Dq => Some(Storage::NF4DQ),
        }
    }

    /// Weights of another kind are another base.
    pub(super) fn hash(self, file: String) -> String {
        match self.storage() {
            None => file,
            Some(storage) => hex::encode(Sha256::digest(format!("{} {file}", storage.name()))),
        }
    }
}

/// A `.gguf` file or a directory in Hugging Face layout.
pub fn open(id: &str, path: &Path, held: Held) -> Result<Arc<Base>, ModelError> {
    if path.is_dir() { open_dir(id, path, held) } else { open_gguf(id, path, held) }
}

fn open_gguf(id: &str, path: &Path, held: Held) -> Result<Arc<Base>, ModelError> {
    let gguf = Gguf::open(path)?;
    let config = ModelConfig::from_gguf(&gguf)?;
    let has_chat_template = gguf.str("tokenizer.chat_template").is_some();
    let hash = hash_file(path)?;
    let vocab = gguf.tensor("token_embd.weight").and_then(|embed| embed.shape.first().copied()).unwrap_or_default();
    let config_json = dense::config_of_gguf(&gguf, &config, vocab);
    let origin = Some(Origin { path: path.to_owned(), held });
    build(id, (config, config_json, origin), hash, has_chat_template, &GgufTensors(gguf), held)
}

fn open_dir(id: &str, dir: &Path, held: Held) -> Result<Arc<Base>, ModelError> {
    let text = read(&dir.join("config.json"))?;
    let json: Value = serde_json::from_slice(&text)
        .map_err(|e| ModelError::Unsupported(format!("{}: {e}", dir.join("config.json").display())))?;
    let config = ModelConfig::from_json(&json)?;
    let mut shards: Vec<_> = fs::read_dir(dir)
        .map_err(|source| io(dir, source))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    shards.sort();
    if shards.is_empty() {
        return Err(ModelError::Unsupported(format!("{} has no .safetensors file", dir.display())));
    }
    let files = shards.iter().map(|path| Safetensors::open(path)).collect::<Result<Vec<_>, _>>()?;
    let mut hash = Sha256::new();
    for path in &shards {
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        hash.update(hash_file(path)?);
    }
    let in_config = fs::read(dir.join("tokenizer_config.json"))
        .is_ok_and(|t| serde_json::from_slice::<Value>(&t).is_ok_and(|v| !v["chat_template"].is_null()));
    let has_chat_template = in_config || dir.join("chat_template.jinja").exists();
    let hash = hex::encode(hash.finalize());
    build(id, (config, Ok(json), None), hash, has_chat_template, &SafetensorsDir(files), held)
}

fn io(path: &Path, source: std::io::Error) -> ModelError {
    FormatError::Io { path: path.display().to_string(), source }.into()
}

fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    fs::read(path).map_err(|source| io(path, source))
}

pub(super) fn hash_file(path: &Path) -> Result<String, ModelError> {
    let mut file = fs::File::open(path).map_err(|source| io(path, source))?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut HashWriter(&mut hash)).map_err(|source| io(path, source))?;
    Ok(hex::encode(hash.finalize()))
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Reads tensors of expected shapes.
struct Loader<'a> {
    tensors: &'a dyn Tensors,
    held: Held,
    /// Added to the weights of norms.
    norm_offset: f32,
}

impl Loader<'_> {
    fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, ModelError> {
        self.optional_weight(name, rows, cols)?
            .ok_or_else(|| ModelError::Unsupported(format!("tensor {name} is missing")))
    }

    fn optional_weight(&self, name: &str, rows: usize, cols: usize) -> Result<Option<Weight>, ModelError> {
        let Some((view, bytes)) = self.tensors.view(name) else { return Ok(None) };
        if view.shape != [rows, cols] {
            return Err(ModelError::Unsupported(format!("tensor {name} is {:?}, not [{rows}, {cols}]", view.shape)));
        }
        Ok(Some(Weight::new(view.storage, rows, cols, bytes)))
    }

    /// A matrix that stays as stored. Where others are quantised it leaves the file, whose mapped pages would count as
    /// a second copy of the model.
    fn kept(&self, weight: Weight) -> Arc<Weight> {
        Arc::new(if self.held == Held::AsStored { weight } else { weight.to_owned_bytes() })
    }

    /// A linear's matrix as the base holds it.
    fn held(&self, name: &str, weight: Weight) -> Result<Weight, ModelError> {
        let Some(storage) = self.held.storage() else { return Ok(weight) };
        let to = storage.name();
        if !matches!(weight.storage, Storage::F32 | Storage::F16 | Storage::BF16) {
            let from = weight.storage.name();
            let what = format!("{to} is made of dense weights, and tensor {name} is stored as {from}");
            return Err(ModelError::Unsupported(what));
        }
        weight.to_nf4(storage).ok_or_else(|| {
            let cols = weight.cols;
            ModelError::Unsupported(format!("{to} has blocks of 64, and tensor {name} has rows of {cols}"))
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let Some((view, _)) = self.tensors.view(name) else { return Ok(None) };
        if view.shape != [len] {
            return Err(ModelError::Unsupported(format!("tensor {name} is {:?}, not [{len}]", view.shape)));
        }
        Ok(Some(view.to_f32()?))
    }

    fn norm(&self, name: &str, len: usize) -> Result<Arc<Vec<f32>>, ModelError> {
        let found = self.optional_norm(name, len)?;
        found.ok_or_else(|| ModelError::Unsupported(format!("tensor {name} is missing")))
    }

    fn optional_norm(&self, name: &str, len: usize) -> Result<Option<Arc<Vec<f32>>>, ModelError> {
        let found = self.vector(name, len)?;
        Ok(found.map(|weights| Arc::new(weights.into_iter().map(|w| w + self.norm_offset).collect())))
    }

    /// A linear's matrix and bias; Phi-3 has those that read the same rows fused, one below the other.
    fn stored(&self, info: &BaseInfo, layer: usize, site: Site) -> Result<(Weight, Option<Vec<f32>>), ModelError> {
        let (rows, cols) = info.shape(site);
        let sites: &[Site] = match site {
            Site::Q | Site::K | Site::V => &[Site::Q, Site::K, Site::V],
            Site::Gate | Site::Up => &[Site::Gate, Site::Up],
            _ => &[],
        };
        let fused = format!("model.layers.{layer}.{}", if sites.len() == 3 { QKV } else { GATE_UP });
        let height = |sites: &[Site]| sites.iter().map(|site| info.shape(*site).0).sum::<usize>();
        let all = height(sites);
        let whole = if sites.is_empty() { None } else { self.optional_weight(&format!("{fused}.weight"), all, cols)? };
        let Some(whole) = whole else {
            let path = site.path(layer);
            let weight = self.weight(&format!("{path}.weight"), rows, cols)?;
            return Ok((weight, self.vector(&format!("{path}.bias"), rows)?));
        };
        let start = height(&sites[..sites.iter().position(|other| *other == site).unwrap_or(0)]);
        let bias = self.vector(&format!("{fused}.bias"), all)?;
        Ok((whole.rows(start, rows), bias.map(|bias| bias[start..start + rows].to_vec())))
    }

    fn linear(&self, info: &BaseInfo, layer: usize, site: Site) -> Result<Linear, ModelError> {
        let (rows, cols) = info.shape(site);
        let (mut weight, mut bias) = self.stored(info, layer, site)?;
        let pairs = gguf::paired_heads(site, info.heads, info.kv_heads);
        if let Some(heads) = pairs.filter(|_| self.tensors.is_interleaved()) {
            let order: Vec<usize> = gguf::halves_order(rows, heads).collect();
            let moved: Vec<u8> = order.iter().flat_map(|row| weight.row_bytes(*row, 1)).copied().collect();
            weight = Weight::new(weight.storage, rows, cols, moved.into());
            bias = bias.map(|b| order.iter().map(|row| b[*row]).collect());
        }
        weight = self.held(&site.path(layer), weight)?;
        weight.bias = bias.map(Arc::from);
        Ok(Linear::new(Arc::new(weight)))
    }
}

/// Modules that hold several linears.
const QKV: &str = "self_attn.qkv_proj";
const GATE_UP: &str = "mlp.gate_up_proj";

fn build(
    id: &str,
    (config, config_json, origin): (ModelConfig, Result<Value, String>, Option<Origin>),
    hash: String,
    has_chat_template: bool,
    tensors: &dyn Tensors,
    held: Held,
) -> Result<Arc<Base>, ModelError> {
    let loader = Loader { tensors, held, norm_offset: config.norm_offset };
    let Some((embed, bytes)) = loader.tensors.view("model.embed_tokens.weight") else {
        return Err(ModelError::Unsupported("tensor model.embed_tokens.weight is missing".to_owned()));
    };
    let &[vocab, width] = embed.shape else {
        return Err(ModelError::Unsupported(format!("the embedding is {:?}, not a matrix", embed.shape)));
    };
    if width != config.hidden {
        return Err(ModelError::Unsupported(format!("the embedding is {width} wide, not {}", config.hidden)));
    }
    let embed = loader.kept(Weight::new(embed.storage, vocab, width, bytes));
    let head = loader.optional_weight("lm_head.weight", vocab, width)?.map(|head| loader.kept(head));
    let mut info = BaseInfo {
        id: id.to_owned(),
        hash: loader.held.hash(hash),
        architecture: config.architecture.clone(),
        storage: String::new(),
        hidden: config.hidden,
        intermediate: config.intermediate,
        layers: config.layers(),
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        vocab,
        context: config.context,
        short_context: config.rope.long.as_ref().map(|long| long.context),
        tied: head.is_none(),
        parameters: 0,
        has_chat_template,
    };
    let layers = (0..config.layers()).map(|i| layer(&loader, &info, &config, i)).collect::<Result<Vec<_>, _>>()?;
    let norm = loader.norm("model.norm.weight", config.hidden)?;
    info.storage = storage_name(&layers).to_owned();
    let head = Linear::new(head.unwrap_or_else(|| embed.clone()));
    let mut base = Base::assemble(info, config, Parts { embed, layers, norm, head, config_json, origin });
    base.info.parameters = base.count();
    Ok(Arc::new(base))
}

fn layer(loader: &Loader, info: &BaseInfo, config: &ModelConfig, i: usize) -> Result<Layer, ModelError> {
    let linear = |site| loader.linear(info, i, site);
    let name = |module: &str| format!("model.layers.{i}.{module}.weight");
    let norm = |module: &str| loader.norm(&name(module), info.hidden);
    let head_norm = |module: &str| loader.optional_norm(&name(module), info.head_dim);
    let attention_norm = norm("input_layernorm")?;
    let (attention_out_norm, mlp_norm, mlp_out_norm) = match config.norms {
        Norms::Before => (None, norm("post_attention_layernorm")?, None),
        Norms::Around => (
            Some(norm("post_attention_layernorm")?),
            norm("pre_feedforward_layernorm")?,
            Some(norm("post_feedforward_layernorm")?),
        ),
    };
    let window = config.windows[i];
    Ok(Layer {
        attention: Attention {
            heads: info.heads,
            kv_heads: info.kv_heads,
            head_dim: info.head_dim,
            window,
            scale: config.query_scale,
            compute: Compute::F32,
        },
        rope: usize::from(window.is_some() && config.local_rope.is_some()),
        attention_norm,
        q: linear(Site::Q)?,
        k: linear(Site::K)?,
        v: linear(Site::V)?,
        o: linear(Site::O)?,
        q_norm: head_norm("self_attn.q_norm")?,
        k_norm: head_norm("self_attn.k_norm")?,
        attention_out_norm,
        mlp_norm,
        mlp: Mlp {
            gate: linear(Site::Gate)?,
            up: linear(Site::Up)?,
            down: linear(Site::Down)?,
            activation: config.activation,
        },
        mlp_out_norm,
    })
}

/// The storage that holds most of the layers' weights.
fn storage_name(layers: &[Layer]) -> &'static str {
    let mut counts: Vec<(Storage, usize)> = Vec::new();
    for weight in layers.iter().flat_map(|l| Site::LAYER.map(|site| l.linear(site).weight().clone())) {
        let n = weight.rows * weight.cols;
        match counts.iter_mut().find(|(storage, _)| *storage == weight.storage) {
            Some((_, count)) => *count += n,
            None => counts.push((weight.storage, n)),
        }
    }
    counts.into_iter().max_by_key(|(_, n)| *n).map_or("none", |(storage, _)| storage.name())
}
