//! The decoder of the Llama family, driven by data.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use candle_core::{Device, Result, Tensor};
use serde_json::Value;

use super::{
    Held, Hook, Linear, ModelError, SequenceCache,
    cache::KvBudget,
    chunked,
    config::ModelConfig,
    gguf::Origin,
    guide::guide,
    load,
    mlp::Mlp,
    ops::{self, Attention},
    pass::Pass,
    rope::Rope,
    weight::{Compute, Weight},
};
use crate::{
    domain::{BaseInfo, Norm, Site},
    formats::Storage,
};

/// A resident base. Immutable; shared by training and serving. Clones share the weights.
#[derive(Clone)]
pub struct Base {
    pub info: BaseInfo,
    pub(super) eps: f32,
    /// Of layers that see all, and of those with a window where they are turned in another way.
    pub(super) ropes: Vec<Rope>,
    pub(super) layers: Vec<Layer>,
    embed: Arc<Weight>,
    embed_scale: f32,
    norm: Arc<Vec<f32>>,
    head: Linear,
    /// config.json of the model, or why it has none.
    pub(super) config_json: Arc<std::result::Result<Value, String>>,
    /// Of bases from a GGUF file.
    pub(super) origin: Option<Arc<Origin>>,
    forwards: Arc<AtomicU64>,
    device: Device,
}

/// One decoder layer.
#[derive(Clone)]
pub(super) struct Layer {
    pub attention: Attention,
    /// Which of the base's ropes turns its heads.
    pub rope: usize,
    pub attention_norm: Arc<Vec<f32>>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    /// RMSNorm over each head of the queries and keys (Qwen3, Gemma).
    pub q_norm: Option<Arc<Vec<f32>>>,
    pub k_norm: Option<Arc<Vec<f32>>>,
    /// What the attention gives goes through it before it is added (Gemma).
    pub attention_out_norm: Option<Arc<Vec<f32>>>,
    pub mlp_norm: Arc<Vec<f32>>,
    pub mlp: Mlp,
    /// The same for the feed-forward block.
    pub mlp_out_norm: Option<Arc<Vec<f32>>>,
}

impl Layer {
    fn computing(&self, compute: Compute) -> Self {
        Self {
            attention: Attention { compute, ..self.attention.clone() },
            q: self.q.computing(compute),
            k: self.k.computing(compute),
            v: self.v.computing(compute),
            o: self.o.computing(compute),
            mlp: Mlp {
                gate: self.mlp.gate.computing(compute),
                up: self.mlp.up.computing(compute),
                down: self.mlp.down.computing(compute),
                activation: self.mlp.activation,
            },
            ..self.clone()
        }
    }

    /// # Panics
    /// For `Site::Head` and `Site::Embed`, which are no layer's.
    pub fn linear(&self, site: Site) -> &Linear {
        match site {
            Site::Q => &self.q,
            Site::K => &self.k,
            Site::V => &self.v,
            Site::O => &self.o,
            Site::Gate => &self.mlp.gate,
            Site::Up => &self.mlp.up,
            Site::Down => &self.mlp.down,
            Site::Head | Site::Embed => unreachable!("the model's ends are not a decoder layer's"),
        }
    }
}

/// Some tokens of one sequence.
pub struct Sequence<'a> {
    pub tokens: &'a [u32],
    /// While training, texts that begin alike: their start, then what each goes on with, and how many tokens each of
    /// those has. None for a single text.
    pub branches: &'a [usize],
    /// The adapter that these rows carry; none is the frozen model.
    pub hook: Option<Arc<dyn Hook>>,
    /// While serving: what came before. The rows are appended to it. While training: none, the sequence starts at 0.
    pub cache: Option<&'a mut SequenceCache>,
}

/// The rows of one forward: sequences one behind another, no padding, each attending to itself only.
/// Neighbours that carry the same adapter (`Arc::ptr_eq`) are one group; put them side by side.
/// Either all sequences have a cache (serving) or none has (training).
pub struct Batch<'a> {
    pub sequences: Vec<Sequence<'a>>,
    /// The key of this pass's random numbers while training, none otherwise (no dropout).
    pub train: Option<u64>,
}

/// A row of scores for each row that was asked for.
pub struct Scores {
    data: Vec<f32>,
    rows: Vec<Range<usize>>,
}

impl Scores {
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[self.rows[i].clone()]
    }
}

/// One trained position: the hidden row that predicts `token`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Row of the batch, `Σ` of the lengths before it plus its place.
    pub row: usize,
    pub token: u32,
    pub weight: f32,
}

/// `loss` is a scalar with gradients (if the hidden rows carry them): `Σ weight · −log p(token)`.
pub struct CrossEntropy {
    pub loss: Tensor,
    /// Targets whose token is the argmax.
    pub correct: usize,
}

/// `values` is `log p(token)` of each target, with gradients (if the hidden rows carry them).
pub struct LogProbs {
    pub values: Tensor,
    /// Targets whose token is the argmax.
    pub correct: usize,
}

impl Base {
    /// A `.gguf` file or a directory in Hugging Face layout.
    pub fn open(id: &str, path: &Path) -> std::result::Result<Arc<Self>, ModelError> {
        Self::open_held(id, path, Held::AsStored)
    }

    /// The same, its linears held in another way than they are stored.
    pub fn open_held(id: &str, path: &Path, held: Held) -> std::result::Result<Arc<Self>, ModelError> {
        load::open(id, path, held)
    }

    pub(super) fn assemble(info: BaseInfo, config: ModelConfig, parts: Parts) -> Self {
        let Parts { embed, layers, norm, head, config_json, origin } = parts;
        let ropes = [config.rope].into_iter().chain(config.local_rope).collect();
        let (eps, embed_scale, forwards) = (config.eps, config.embed_scale, Arc::default());
        let (config_json, origin, device) = (Arc::new(config_json), origin.map(Arc::new), Device::Cpu);
        Self { info, eps, ropes, layers, embed, embed_scale, norm, head, config_json, origin, forwards, device }
    }

    /// The same resident weights, their products made in another precision.
    pub fn computing(&self, compute: Compute) -> Arc<Self> {
        Arc::new(Self {
            layers: self.layers.iter().map(|layer| layer.computing(compute)).collect(),
            head: self.head.computing(compute),
            ..self.clone()
        })
    }

    /// The same on a device: activations live there, and weights once they have been used.
    pub fn on(&self, device: &Device) -> Arc<Self> {
        Arc::new(Self { device: device.clone(), ..self.clone() })
    }

    /// Where activations are. A method's own tensors are in the host's memory; ops take them over.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether its ops are our fused ones; else they are composed of candle's.
    pub fn is_fused(&self) -> bool {
        !ops::is_composed_on(&self.device)
    }

    /// What `precision: auto` means here: f32 on a base of F32, else bf16 where the kernels have it.
    pub fn auto_compute(&self) -> Compute {
        let most = self.info.storage.as_str();
        match most == Storage::F32.name() {
            true => Compute::F32,
            false if !self.device.is_cpu() => Compute::Bf16,
            false => Compute::auto(Storage::BF16),
        }
    }

    /// Hidden states after the final norm, `(rows, hidden)`: one row per token, virtual ones left out.
    pub fn forward(&self, batch: &mut Batch) -> Result<Tensor> {
        let mut pass = self.begin(batch)?;
        pass.reserve(batch)?;
        let mut x = pass.embed(self, batch)?;
        for layer in 0..self.layers.len() {
            x = pass.layer(self, batch, layer, &x, &pass.prefixes(layer)?)?;
        }
        pass.finish(batch);
        self.end(&pass, &x)
    }

    /// Hooks that need a first pass get it, and are replaced by what they make of its rows.
    pub(super) fn begin(&self, batch: &mut Batch) -> Result<Pass> {
        guide(self, batch)?;
        self.forwards.fetch_add(1, Ordering::Relaxed);
        Pass::new(self, batch)
    }

    /// The last layer's rows, normed, without the virtual ones.
    pub(super) fn end(&self, pass: &Pass, x: &Tensor) -> Result<Tensor> {
        pass.token_rows(&pass.norm(Norm::Final, x, &self.norm, self.eps)?)
    }

    /// Output scores of hidden rows `(n, hidden) → (n, vocab)`, where the rows are; all carry the same `hook`.
    pub fn logits(&self, hidden: &Tensor, hook: Option<&dyn Hook>) -> Result<Tensor> {
        match hook.map(|hook| hook.head(hidden, &self.head)).transpose()?.flatten() {
            Some(scores) => Ok(scores),
            None => self.head.forward(hidden),
        }
    }

    /// Scores of hidden rows `(n, hidden)` for choosing tokens: each range of rows carries one hook, and together they
    /// are all rows, in order. One product for all whose output layer is the base's.
    pub fn scores(&self, hidden: &Tensor, hooks: &[(Range<usize>, Option<&dyn Hook>)]) -> Result<Scores> {
        let (mut frozen, mut own) = (Vec::new(), Vec::new());
        for (rows, hook) in hooks {
            let head =
                |hook: &dyn Hook| hook.head(&hidden.narrow(0, rows.start, rows.len())?.contiguous()?, &self.head);
            match hook.map(head).transpose()?.flatten() {
                Some(scores) => own.push((rows.clone(), scores)),
                None => frozen.extend(rows.clone().map(|row| row as u32)),
            }
        }
        let mut found = Scores { data: Vec::new(), rows: vec![0..0; hidden.dim(0)?] };
        if !frozen.is_empty() {
            let all = frozen.len() == found.rows.len();
            let hidden = match all {
                true => hidden.contiguous()?,
                false => hidden.index_select(&Tensor::new(frozen.as_slice(), hidden.device())?, 0)?,
            };
            let width = self.head.shape().0;
            found.data = ops::frozen_product(&hidden, self.head.weight())?;
            for (i, row) in frozen.into_iter().enumerate() {
                found.rows[row as usize] = i * width..(i + 1) * width;
            }
        }
        for (rows, scores) in own {
            for (row, scores) in rows.zip(scores.to_vec2::<f32>()?) {
                found.rows[row] = found.data.len()..found.data.len() + scores.len();
                found.data.extend(scores);
            }
        }
        Ok(found)
    }

    /// Cross entropy over some rows, in chunks: never rows × vocabulary at once, unless the hook has a `head` that is
    /// not made of parts. No gradient work when `hidden` does not carry one.
    pub fn cross_entropy(&self, hidden: &Tensor, targets: &[Target], hook: Option<&dyn Hook>) -> Result<CrossEntropy> {
        if let Some(hook) = hook.filter(|hook| !hook.head_parts().is_empty()) {
            let (loss, correct) = chunked::cross_entropy(hidden, &hook.head_parts(), targets, |parts, x| {
                hook.head_of(parts, x, &self.head)
            })?;
            return Ok(CrossEntropy { loss: loss.to_device(&Device::Cpu)?, correct });
        }
        let own = hook.map(|hook| hook.head(hidden, &self.head)).transpose()?.flatten();
        let (loss, correct) = match own {
            Some(scores) => ops::dense_cross_entropy(&scores, targets)?,
            None => ops::cross_entropy(hidden, self.head.weight(), targets)?,
        };
        Ok(CrossEntropy { loss: loss.to_device(&Device::Cpu)?, correct })
    }

    /// Log-probabilities of the targets' tokens, in chunks, as in `cross_entropy`.
    pub fn log_probs(&self, hidden: &Tensor, targets: &[Target], hook: Option<&dyn Hook>) -> Result<LogProbs> {
        let own = hook.map(|hook| hook.head(hidden, &self.head)).transpose()?.flatten();
        let (values, correct) = match own {
            Some(scores) => ops::dense_log_probs(&scores, targets)?,
            None => ops::log_probs(hidden, self.head.weight(), targets)?,
        };
        Ok(LogProbs { values: values.to_device(&Device::Cpu)?, correct })
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> SequenceCache {
        self.cache_within(KvBudget::new(usize::MAX))
    }

    /// The same, for a sequence whose pages are some of many.
    pub fn cache_within(&self, budget: Arc<KvBudget>) -> SequenceCache {
        // The same in every layer.
        let width = self.layers.first().map_or(0, |l| l.attention.kv_heads * l.attention.head_dim);
        SequenceCache::new(self.layers.len(), width, budget)
    }

    /// A linear by its place; the layer does not matter for the output layer.
    pub fn linear(&self, layer: usize, site: Site) -> &Linear {
        match site {
            Site::Head => &self.head,
            site => self.layers[layer].linear(site),
        }
    }

    /// A norm's weights.
    pub fn norm(&self, place: Norm) -> &[f32] {
        match place {
            Norm::Attention(layer) => &self.layers[layer].attention_norm,
            Norm::Query(layer) => self.layers[layer].q_norm.as_deref().map_or(&[], |norm| norm),
            Norm::Key(layer) => self.layers[layer].k_norm.as_deref().map_or(&[], |norm| norm),
            Norm::Mlp(layer) => &self.layers[layer].mlp_norm,
            Norm::Final => &self.norm,
        }
    }

    /// Embeddings of tokens as the first layer takes them, `(ids, hidden)`: rows of the table times `embed_scale`, in
    /// the host's memory.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let h = self.info.hidden;
        let mut data = vec![0.0; ids.len() * h];
        for (row, id) in data.chunks_mut(h).zip(ids) {
            if *id as usize >= self.info.vocab {
                candle_core::bail!("token id {id} is outside the vocabulary of {}", self.info.vocab);
            }
            self.embed.dequantize_rows(*id as usize, 1, row);
        }
        if self.embed_scale != 1.0 {
            data.iter_mut().for_each(|x| *x *= self.embed_scale);
        }
        Tensor::from_vec(data, (ids.len(), h), &Device::Cpu)
    }

    /// What token embeddings are multiplied with (Gemma's √hidden; else 1).
    pub fn embed_scale(&self) -> f32 {
        self.embed_scale
    }

    /// Forward passes of the decoder since start: what a test of batching counts.
    pub fn forward_count(&self) -> u64 {
        self.forwards.load(Ordering::Relaxed)
    }

    /// Bytes that the weights hold in memory or map.
    pub fn bytes(&self) -> u64 {
        self.matrices().map(|w| w.bytes() as u64).sum()
    }

    /// The number of weights, norms and biases aside.
    pub(super) fn count(&self) -> u64 {
        self.matrices().map(|w| (w.rows * w.cols) as u64).sum()
    }

    fn matrices(&self) -> impl Iterator<Item = &Arc<Weight>> {
        let head = Some(self.head.weight()).filter(|head| !head.is_same(&self.embed));
        let linears = self.layers.iter().flat_map(|l| Site::LAYER.map(|site| l.linear(site).weight()));
        linears.chain([&self.embed]).chain(head)
    }
}

/// What a loader puts together.
pub(super) struct Parts {
    pub embed: Arc<Weight>,
    pub layers: Vec<Layer>,
    pub norm: Arc<Vec<f32>>,
    pub head: Linear,
    pub config_json: std::result::Result<Value, String>,
    pub origin: Option<Origin>,
}
