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

use super::{
    Hook, Linear, ModelError, SequenceCache,
    config::ModelConfig,
    kernels::Mat,
    load,
    mlp::Mlp,
    ops::{self, Attention, RopeTable},
    pass::Pass,
    weight::{Compute, Weight},
};
use crate::{
    domain::{BaseInfo, Site},
    formats::Storage,
};

/// A resident base. Immutable; shared by training and serving.
pub struct Base {
    pub info: BaseInfo,
    pub(super) eps: f32,
    pub(super) attention: Attention,
    pub(super) rope: Arc<RopeTable>,
    pub(super) layers: Vec<Layer>,
    embed: Arc<Weight>,
    norm: Arc<Vec<f32>>,
    head: Linear,
    forwards: Arc<AtomicU64>,
}

/// One decoder layer.
pub(super) struct Layer {
    pub attention_norm: Arc<Vec<f32>>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    /// RMSNorm over each head of the queries and keys (Qwen3).
    pub q_norm: Option<Arc<Vec<f32>>>,
    pub k_norm: Option<Arc<Vec<f32>>>,
    pub mlp_norm: Arc<Vec<f32>>,
    pub mlp: Mlp,
}

impl Layer {
    fn computing(&self, compute: Compute) -> Self {
        Self {
            attention_norm: self.attention_norm.clone(),
            q: self.q.computing(compute),
            k: self.k.computing(compute),
            v: self.v.computing(compute),
            o: self.o.computing(compute),
            q_norm: self.q_norm.clone(),
            k_norm: self.k_norm.clone(),
            mlp_norm: self.mlp_norm.clone(),
            mlp: Mlp {
                gate: self.mlp.gate.computing(compute),
                up: self.mlp.up.computing(compute),
                down: self.mlp.down.computing(compute),
            },
        }
    }

    /// # Panics
    /// For `Site::Head`, which is no layer's.
    pub fn linear(&self, site: Site) -> &Linear {
        match site {
            Site::Q => &self.q,
            Site::K => &self.k,
            Site::V => &self.v,
            Site::O => &self.o,
            Site::Gate => &self.mlp.gate,
            Site::Up => &self.mlp.up,
            Site::Down => &self.mlp.down,
            Site::Head => unreachable!("the output layer is not a decoder layer's"),
        }
    }
}

/// Some tokens of one sequence.
pub struct Sequence<'a> {
    pub tokens: &'a [u32],
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

impl Base {
    /// A `.gguf` file or a directory in Hugging Face layout.
    pub fn open(id: &str, path: &Path) -> std::result::Result<Arc<Self>, ModelError> {
        load::open(id, path)
    }

    pub(super) fn assemble(info: BaseInfo, config: ModelConfig, parts: Parts) -> Self {
        let attention = Attention {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            window: config.window,
        };
        let Parts { embed, layers, norm, head, rope } = parts;
        Self { info, eps: config.eps, attention, rope, layers, embed, norm, head, forwards: Arc::default() }
    }

    /// The same resident weights, their products made in another precision.
    pub fn computing(&self, compute: Compute) -> Arc<Self> {
        Arc::new(Self {
            info: self.info.clone(),
            eps: self.eps,
            attention: self.attention.clone(),
            rope: self.rope.clone(),
            layers: self.layers.iter().map(|layer| layer.computing(compute)).collect(),
            embed: self.embed.clone(),
            norm: self.norm.clone(),
            head: self.head.computing(compute),
            forwards: self.forwards.clone(),
        })
    }

    /// What `precision: auto` means here: f32 on a base of F32, else bf16 where the kernels have it.
    pub fn auto_compute(&self) -> Compute {
        let most = self.info.storage.as_str();
        if most == Storage::F32.name() { Compute::F32 } else { Compute::auto(Storage::BF16) }
    }

    /// Hidden states after the final norm, `(rows, hidden)`: one row per token, virtual ones left out.
    pub fn forward(&self, batch: &mut Batch) -> Result<Tensor> {
        self.forwards.fetch_add(1, Ordering::Relaxed);
        let mut pass = Pass::new(self, batch)?;
        let mut x = pass.embed(self, batch)?;
        for layer in 0..self.layers.len() {
            x = pass.layer(self, batch, layer, &x)?;
        }
        pass.finish(batch);
        ops::rms_norm(&pass.token_rows(&x)?, &self.norm, self.eps)
    }

    /// Output scores of hidden rows `(n, hidden) → (n, vocab)`; all rows carry the same `hook`.
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
                false => hidden.index_select(&Tensor::new(frozen.as_slice(), &Device::Cpu)?, 0)?,
            };
            let width = self.head.shape().0;
            found.data.resize(frozen.len() * width, 0.0);
            ops::with([&hidden], |[x]| {
                self.head.weight().forward(Mat::new(x, frozen.len(), self.info.hidden), &mut found.data);
                Ok(())
            })?;
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

    /// Cross entropy over some rows, in chunks: never rows × vocabulary at once, unless the hook has a head of its
    /// own. No gradient work when `hidden` does not carry one.
    pub fn cross_entropy(&self, hidden: &Tensor, targets: &[Target], hook: Option<&dyn Hook>) -> Result<CrossEntropy> {
        let own = hook.map(|hook| hook.head(hidden, &self.head)).transpose()?.flatten();
        let (loss, correct) = match own {
            Some(scores) => ops::dense_cross_entropy(&scores, targets)?,
            None => ops::cross_entropy(hidden, self.head.weight(), targets)?,
        };
        Ok(CrossEntropy { loss, correct })
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> SequenceCache {
        SequenceCache::new(self.layers.len())
    }

    /// A linear by its place; the layer does not matter for the output layer.
    pub fn linear(&self, layer: usize, site: Site) -> &Linear {
        match site {
            Site::Head => &self.head,
            site => self.layers[layer].linear(site),
        }
    }

    /// Rows of the embedding table as F32, `(ids, hidden)`.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let h = self.info.hidden;
        let mut data = vec![0.0; ids.len() * h];
        for (row, id) in data.chunks_mut(h).zip(ids) {
            if *id as usize >= self.info.vocab {
                candle_core::bail!("token id {id} is outside the vocabulary of {}", self.info.vocab);
            }
            self.embed.dequantize_rows(*id as usize, 1, row);
        }
        Tensor::from_vec(data, (ids.len(), h), &Device::Cpu)
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
    pub rope: Arc<RopeTable>,
}
