//! What is known of a resident base without touching a tensor.

use serde::{Deserialize, Serialize};

/// A module that methods change. `Head` is the output layer and `Embed` the token embedding, which is no linear; all
/// others are linears that exist once a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
    Head,
    Embed,
}

impl Site {
    /// The linears of one decoder layer, in the order of the forward pass.
    pub const LAYER: [Site; 7] = [Site::Q, Site::K, Site::V, Site::O, Site::Gate, Site::Up, Site::Down];

    /// The module's path below its decoder layer, as in Hugging Face models.
    pub fn module(self) -> &'static str {
        match self {
            Site::Q => "self_attn.q_proj",
            Site::K => "self_attn.k_proj",
            Site::V => "self_attn.v_proj",
            Site::O => "self_attn.o_proj",
            Site::Gate => "mlp.gate_proj",
            Site::Up => "mlp.up_proj",
            Site::Down => "mlp.down_proj",
            Site::Head => "lm_head",
            Site::Embed => "model.embed_tokens",
        }
    }

    /// The module's full path: `model.layers.3.self_attn.q_proj`, `lm_head` or `model.embed_tokens`.
    pub fn path(self, layer: usize) -> String {
        match self {
            Site::Head | Site::Embed => self.module().to_owned(),
            site => format!("model.layers.{layer}.{}", site.module()),
        }
    }
}

/// A norm whose weights can be an adapter's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// Before a layer's attention.
    Attention(usize),
    /// Of each head's queries in a layer (Qwen 3).
    Query(usize),
    /// Of each head's keys.
    Key(usize),
    /// Before a layer's feed-forward block.
    Mlp(usize),
    /// Before the output layer.
    Final,
}

impl Norm {
    /// The module's full path, as in Hugging Face models.
    pub fn path(self) -> String {
        match self {
            Norm::Attention(layer) => format!("model.layers.{layer}.input_layernorm"),
            Norm::Query(layer) => format!("model.layers.{layer}.self_attn.q_norm"),
            Norm::Key(layer) => format!("model.layers.{layer}.self_attn.k_norm"),
            Norm::Mlp(layer) => format!("model.layers.{layer}.post_attention_layernorm"),
            Norm::Final => "model.norm".to_owned(),
        }
    }
}

/// Shapes and limits of a base, enough to check a request against it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BaseInfo {
    /// The name that requests use.
    pub id: String,
    /// SHA-256 (hex) of the weights' file, or of the listing of a directory's files; another one where they are
    /// quantised at load.
    pub hash: String,
    /// The family, by its name in GGUF files: `llama`, `mistral`, `qwen2`, `qwen3`, `gemma3`, `phi3`.
    pub architecture: String,
    /// How most weights are held: `Q4_1`, `F16`, `NF4-DQ` …
    pub storage: String,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// The longest sequence, in tokens.
    pub context: usize,
    /// How long a sequence may become that has begun within this length (LongRoPE turns longer ones in another way
    /// from their first token on); none where that is the whole context.
    #[serde(default)]
    pub short_context: Option<usize>,
    pub tied: bool,
    /// The number of weights.
    pub parameters: u64,
    pub has_chat_template: bool,
}

impl BaseInfo {
    /// The longest that a sequence can become which begins with a prompt of this length.
    pub fn longest(&self, prompt: usize) -> usize {
        self.short_context.filter(|short| prompt <= *short).unwrap_or(self.context).min(self.context)
    }

    /// `(out, in)`: of the embedding, a token's row is an input and its numbers are the outputs.
    pub fn shape(&self, site: Site) -> (usize, usize) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match site {
            Site::Q => (q, self.hidden),
            Site::K | Site::V => (kv, self.hidden),
            Site::O => (self.hidden, q),
            Site::Gate | Site::Up => (self.intermediate, self.hidden),
            Site::Down => (self.hidden, self.intermediate),
            Site::Head => (self.vocab, self.hidden),
            Site::Embed => (self.hidden, self.vocab),
        }
    }

    /// Every linear of the decoder layers, as `(layer, site)`, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = (usize, Site)> + '_ {
        (0..self.layers).flat_map(|layer| Site::LAYER.into_iter().map(move |site| (layer, site)))
    }
}
