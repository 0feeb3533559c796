//! What a decoder of the Llama family looks like, read from GGUF metadata or config.json.

use serde_json::Value;

use super::ModelError;
use crate::formats::gguf::Gguf;

/// Sizes and settings; biases and q/k norms follow from the tensors that are there.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    pub architecture: String,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context: usize,
    pub eps: f32,
    /// Angle per position of each rotated pair, after scaling.
    pub rope: Vec<f32>,
    /// How far back a layer's queries see; none sees all.
    pub window: Option<usize>,
}

/// The families whose block this decoder is.
const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

fn unsupported<T>(what: impl Into<String>) -> Result<T, ModelError> {
    Err(ModelError::Unsupported(what.into()))
}

fn known(architecture: &str) -> Result<String, ModelError> {
    if FAMILIES.contains(&architecture) {
        return Ok(architecture.to_owned());
    }
    unsupported(format!("architecture {architecture:?} is not one of {}", FAMILIES.join(", ")))
}

impl ModelConfig {
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let Some(name) = gguf.str("general.architecture") else {
            return unsupported("general.architecture is missing");
        };
        let architecture = known(name)?;
        let key = |k: &str| format!("{architecture}.{k}");
        let size = |k: &str| match gguf.u64(&key(k)) {
            Some(n) => usize::try_from(n).or_else(|_| unsupported(format!("{} is too large", key(k)))),
            None => unsupported(format!("{} is missing", key(k))),
        };
        let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
        let optional = |k: &str| gguf.u64(&key(k)).and_then(|n| usize::try_from(n).ok());
        let head_dim = optional("attention.key_length").unwrap_or(hidden / heads.max(1));
        let theta = gguf.f64(&key("rope.freq_base")).unwrap_or(10_000.0);
        let mut rope = frequencies(theta, head_dim);
        match gguf.str(&key("rope.scaling.type")).unwrap_or("none") {
            "none" => {}
            "linear" => divide(&mut rope, gguf.f64(&key("rope.scaling.factor")).unwrap_or(1.0)),
            other => return unsupported(format!("rope scaling {other:?} is not one of none, linear")),
        }
        if let Some(factors) = gguf.tensor("rope_freqs.weight") {
            let factors = factors.to_f32()?;
            if factors.len() != rope.len() {
                return unsupported(format!("rope_freqs.weight has {} factors, not {}", factors.len(), rope.len()));
            }
            rope.iter_mut().zip(factors).for_each(|(f, factor)| *f /= factor);
        }
        Self {
            hidden,
            heads,
            head_dim,
            rope,
            intermediate: size("feed_forward_length")?,
            layers: size("block_count")?,
            kv_heads: optional("attention.head_count_kv").unwrap_or(heads),
            context: size("context_length")?,
            eps: gguf.f64(&key("attention.layer_norm_rms_epsilon")).unwrap_or(1e-5) as f32,
            window: optional("attention.sliding_window").filter(|w| *w > 0),
            architecture,
        }
        .checked()
    }

    /// From a Hugging Face config.json.
    pub fn from_json(config: &Value) -> Result<Self, ModelError> {
        let architecture = known(config["model_type"].as_str().unwrap_or("(no model_type)"))?;
        let optional = |k: &str| config[k].as_u64().and_then(|n| usize::try_from(n).ok());
        let size = |k: &str| optional(k).map_or_else(|| unsupported(format!("config.json: {k} is missing")), Ok);
        let activation = config["hidden_act"].as_str().unwrap_or("silu");
        if activation != "silu" {
            return unsupported(format!("hidden_act {activation:?} is not silu"));
        }
        let (hidden, heads) = (size("hidden_size")?, size("num_attention_heads")?);
        let head_dim = optional("head_dim").unwrap_or(hidden / heads.max(1));
        // Newer files keep theta and scaling together in `rope_parameters`.
        let scaling = [&config["rope_parameters"], &config["rope_scaling"]].into_iter().find(|v| v.is_object());
        let theta = scaling.and_then(|s| s["rope_theta"].as_f64()).or(config["rope_theta"].as_f64());
        let mut rope = frequencies(theta.unwrap_or(10_000.0), head_dim);
        if let Some(scaling) = scaling {
            scale(&mut rope, scaling)?;
        }
        // Qwen names a window that `use_sliding_window` switches on.
        let has_window = config["use_sliding_window"].as_bool().unwrap_or(architecture == "mistral");
        Self {
            hidden,
            heads,
            head_dim,
            rope,
            intermediate: size("intermediate_size")?,
            layers: size("num_hidden_layers")?,
            kv_heads: optional("num_key_value_heads").unwrap_or(heads),
            context: size("max_position_embeddings")?,
            eps: config["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32,
            window: optional("sliding_window").filter(|_| has_window),
            architecture,
        }
        .checked()
    }

    /// Sizes that nothing can be built from are refused here, before any allocation.
    fn checked(self) -> Result<Self, ModelError> {
        let sizes =
            [self.hidden, self.intermediate, self.layers, self.heads, self.kv_heads, self.head_dim, self.context];
        if sizes.iter().any(|n| *n == 0 || *n > 1 << 24) {
            return unsupported(format!("a size of the model is 0 or beyond 2^24: {sizes:?}"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head_dim.is_multiple_of(2) {
            return unsupported(format!("{} heads of {} over {} key heads", self.heads, self.head_dim, self.kv_heads));
        }
        Ok(self)
    }
}

/// `θ^(−2i/d)` for each pair, in f32 as transformers makes them.
fn frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32)).collect()
}

fn divide(rope: &mut [f32], factor: f64) {
    rope.iter_mut().for_each(|f| *f /= factor as f32);
}

/// `rope_scaling` of config.json: `linear` and `llama3`.
fn scale(rope: &mut [f32], scaling: &Value) -> Result<(), ModelError> {
    let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
    let number = |k: &str| match scaling[k].as_f64() {
        Some(x) if x > 0.0 => Ok(x as f32),
        _ => unsupported(format!("rope scaling {kind}: {k} is missing or not positive")),
    };
    match kind {
        "default" => {}
        "linear" => divide(rope, f64::from(number("factor")?)),
        "llama3" => {
            let (factor, low, high) = (number("factor")?, number("low_freq_factor")?, number("high_freq_factor")?);
            let original = number("original_max_position_embeddings")?;
            for f in rope.iter_mut() {
                let wavelength = 2.0 * std::f32::consts::PI / *f;
                // Long waves are stretched by the factor, short ones kept, those between mixed.
                let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                *f = (1.0 - smooth) * *f / factor + smooth * *f;
            }
        }
        other => return unsupported(format!("rope scaling {other:?} is not one of default, linear, llama3")),
    }
    Ok(())
}
