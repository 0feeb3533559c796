//! What a decoder of the Llama family looks like, read from GGUF metadata or config.json.

use serde_json::Value;

use super::{ModelError, ops::Activation, rope::Rope};
use crate::formats::gguf::Gguf;

/// Sizes and settings; biases, q/k norms and fused linears follow from the tensors that are there.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    pub architecture: String,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context: usize,
    pub eps: f32,
    /// How far back each layer's queries see; none sees all.
    pub windows: Vec<Option<usize>>,
    pub rope: Rope,
    /// Of the layers with a window, where it is another one.
    pub local_rope: Option<Rope>,
    /// On the scores of queries and keys.
    pub query_scale: f32,
    /// On token embeddings.
    pub embed_scale: f32,
    pub activation: Activation,
    pub norms: Norms,
    /// What the file leaves out of its norms' weights (Gemma's are stored around 0).
    pub norm_offset: f32,
}

/// Where a layer has its norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// Before the attention and before the feed-forward block.
    Before,
    /// Before and behind both (Gemma).
    Around,
}

/// The families whose block this decoder is; the multimodal Gemma 3 is not one.
const FAMILIES: [&str; 6] = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"];

/// Every sixth layer of Gemma 3 sees all.
const PATTERN: usize = 6;

/// The base of the angles in Gemma's layers with a window.
const LOCAL_THETA: f64 = 10_000.0;

pub fn unsupported<T>(what: impl Into<String>) -> Result<T, ModelError> {
    Err(ModelError::Unsupported(what.into()))
}

fn known(architecture: &str) -> Result<String, ModelError> {
    if FAMILIES.contains(&architecture) {
        return Ok(architecture.to_owned());
    }
    unsupported(format!("architecture {architecture:?} is not one of {}", FAMILIES.join(", ")))
}

/// A window in all layers but every `pattern`th.
fn windows(layers: usize, window: Option<usize>, pattern: Option<usize>) -> Vec<Option<usize>> {
    (1..=layers).map(|layer| window.filter(|_| pattern.is_none_or(|p| p == 0 || !layer.is_multiple_of(p)))).collect()
}

/// Sizes that nothing can be built from are refused before any allocation.
fn check_sizes(sizes: &[usize]) -> Result<(), ModelError> {
    match sizes.iter().any(|n| *n == 0 || *n > 1 << 24) {
        true => unsupported(format!("a size of the model is 0 or beyond 2^24: {sizes:?}")),
        false => Ok(()),
    }
}

impl ModelConfig {
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let Some(name) = gguf.str("general.architecture") else {
            return unsupported("general.architecture is missing");
        };
        let architecture = known(name)?;
        let is_gemma = architecture == "gemma3";
        let key = |k: &str| format!("{architecture}.{k}");
        let size = |k: &str| match gguf.u64(&key(k)) {
            Some(n) => usize::try_from(n).or_else(|_| unsupported(format!("{} is too large", key(k)))),
            None => unsupported(format!("{} is missing", key(k))),
        };
        let optional = |k: &str| gguf.u64(&key(k)).and_then(|n| usize::try_from(n).ok());
        let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
        let (layers, context) = (size("block_count")?, size("context_length")?);
        let head_dim = optional("attention.key_length").unwrap_or(hidden / heads.max(1));
        check_sizes(&[hidden, heads, layers, context, head_dim])?;
        let turned = optional("rope.dimension_count").unwrap_or(head_dim).min(head_dim);
        let theta = gguf.f64(&key("rope.freq_base")).unwrap_or(10_000.0);
        let mut rope = Rope::new(theta, turned / 2, head_dim);
        rope.scale_gguf(gguf, &architecture, context)?;
        let local_theta = gguf.f64(&key("rope.freq_base_swa")).unwrap_or(LOCAL_THETA);
        let window = optional("attention.sliding_window").filter(|w| *w > 0);
        let pattern = optional("attention.sliding_window_pattern").or(is_gemma.then_some(PATTERN));
        for cap in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if gguf.f64(&key(cap)).is_some_and(|cap| cap > 0.0) {
                return unsupported(format!("{} is not supported", key(cap)));
            }
        }
        Self {
            local_rope: is_gemma.then(|| Rope::new(local_theta, turned / 2, head_dim)),
            // llama.cpp's rule for Gemma 3 27B, which the file does not say.
            query_scale: 1.0 / ((if is_gemma && layers == 62 { hidden / heads } else { head_dim }) as f32).sqrt(),
            embed_scale: if is_gemma { (hidden as f32).sqrt() } else { 1.0 },
            activation: if is_gemma { Activation::Gelu } else { Activation::Silu },
            norms: if is_gemma { Norms::Around } else { Norms::Before },
            norm_offset: 0.0,
            hidden,
            heads,
            head_dim,
            context,
            rope,
            intermediate: size("feed_forward_length")?,
            kv_heads: optional("attention.head_count_kv").unwrap_or(heads),
            eps: gguf.f64(&key("attention.layer_norm_rms_epsilon")).unwrap_or(1e-5) as f32,
            windows: windows(layers, window, pattern),
            architecture,
        }
        .checked()
    }

    /// From a Hugging Face config.json.
    pub fn from_json(config: &Value) -> Result<Self, ModelError> {
        let model_type = config["model_type"].as_str().unwrap_or("(no model_type)");
        if model_type == "gemma3" {
            return unsupported("model_type gemma3 reads images too; only the text models, gemma3_text, are supported");
        }
        let architecture = known(if model_type == "gemma3_text" { "gemma3" } else { model_type })?;
        let is_gemma = architecture == "gemma3";
        let optional = |k: &str| config[k].as_u64().and_then(|n| usize::try_from(n).ok());
        let size = |k: &str| optional(k).map_or_else(|| unsupported(format!("config.json: {k} is missing")), Ok);
        let activation = ["hidden_activation", "hidden_act"].iter().find_map(|k| config[k].as_str()).unwrap_or("silu");
        let activation = match activation {
            "silu" => Activation::Silu,
            "gelu_pytorch_tanh" => Activation::Gelu,
            other => return unsupported(format!("hidden_act {other:?} is not one of silu, gelu_pytorch_tanh")),
        };
        for key in ["attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"] {
            if !matches!(config[key], Value::Null | Value::Bool(false)) {
                return unsupported(format!("config.json: {key} is not supported"));
            }
        }
        let (hidden, heads, layers) = (size("hidden_size")?, size("num_attention_heads")?, size("num_hidden_layers")?);
        let head_dim = optional("head_dim").unwrap_or(hidden / heads.max(1));
        check_sizes(&[hidden, heads, layers, head_dim])?;
        let (rope, local_rope) = ropes(config, head_dim, is_gemma)?;
        // Qwen names a window that `use_sliding_window` switches on.
        let has_window = config["use_sliding_window"].as_bool().unwrap_or(!architecture.starts_with("qwen"));
        let window = optional("sliding_window").filter(|_| has_window);
        let windows = match config["layer_types"].as_array() {
            Some(kinds) => {
                kinds.iter().map(|kind| window.filter(|_| kind.as_str() == Some("sliding_attention"))).collect()
            }
            None => windows(layers, window, optional("sliding_window_pattern").or(is_gemma.then_some(PATTERN))),
        };
        if windows.len() != layers {
            return unsupported(format!("config.json: layer_types names {} layers, not {layers}", windows.len()));
        }
        let scalar = config["query_pre_attn_scalar"].as_f64().filter(|x| *x > 0.0).unwrap_or(head_dim as f64);
        Self {
            query_scale: 1.0 / (scalar as f32).sqrt(),
            embed_scale: if is_gemma { (hidden as f32).sqrt() } else { 1.0 },
            norms: if is_gemma { Norms::Around } else { Norms::Before },
            norm_offset: if is_gemma { 1.0 } else { 0.0 },
            activation,
            hidden,
            heads,
            head_dim,
            rope,
            local_rope,
            intermediate: size("intermediate_size")?,
            kv_heads: optional("num_key_value_heads").unwrap_or(heads),
            context: size("max_position_embeddings")?,
            eps: config["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32,
            windows,
            architecture,
        }
        .checked()
    }

    pub fn layers(&self) -> usize {
        self.windows.len()
    }

    fn checked(self) -> Result<Self, ModelError> {
        check_sizes(&[self.intermediate, self.kv_heads, self.context])?;
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head_dim.is_multiple_of(2) {
            return unsupported(format!("{} heads of {} over {} key heads", self.heads, self.head_dim, self.kv_heads));
        }
        Ok(self)
    }
}

/// The angles of layers that see all, and of those with a window where they are others.
fn ropes(config: &Value, head_dim: usize, is_gemma: bool) -> Result<(Rope, Option<Rope>), ModelError> {
    // Newer files keep theta and scaling together in `rope_parameters`, for each kind of layer if kinds differ.
    let parameters = &config["rope_parameters"];
    let global = if parameters["full_attention"].is_object() { &parameters["full_attention"] } else { parameters };
    let scaling = [global, &config["rope_scaling"]].into_iter().find(|v| v.is_object());
    let number = |k: &str| scaling.and_then(|s| s[k].as_f64()).or(config[k].as_f64());
    let turned = (head_dim as f64 * number("partial_rotary_factor").unwrap_or(1.0).clamp(0.0, 1.0)) as usize;
    let theta = number("rope_theta").unwrap_or(if is_gemma { 1_000_000.0 } else { 10_000.0 });
    let mut rope = Rope::new(theta, turned / 2, head_dim);
    if let Some(scaling) = scaling {
        rope.scale(scaling, config)?;
    }
    if !is_gemma {
        return Ok((rope, None));
    }
    let local = &parameters["sliding_attention"];
    let theta = local["rope_theta"].as_f64().or(config["rope_local_base_freq"].as_f64()).unwrap_or(LOCAL_THETA);
    let mut local_rope = Rope::new(theta, turned / 2, head_dim);
    local_rope.scale(local, config)?;
    Ok((rope, Some(local_rope)))
}
