//! Rotary positions (arXiv 2104.09864) and the ways in which files stretch them.

use serde_json::Value;

use super::{ModelError, config::unsupported, ops::Rotation};
use crate::formats::gguf::Gguf;

/// How the heads of some layers are turned. Angles are made in f32 as transformers makes them.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Numbers of a head; pairs beyond `frequencies` are not turned.
    pub head_dim: usize,
    /// Angle per position of each pair, after scaling.
    pub frequencies: Vec<f32>,
    /// What sequences longer than the model was first trained for take instead.
    pub long: Option<Long>,
    /// On cosines and sines.
    pub factor: f32,
}

/// LongRoPE (arXiv 2402.13753): other angles for all positions of a sequence that goes beyond `context`.
#[derive(Clone, Debug, PartialEq)]
pub struct Long {
    pub context: usize,
    pub frequencies: Vec<f32>,
}

impl Rope {
    /// `θ^(−2i/d)` for each of `pairs` pairs, with d twice their number.
    pub fn new(theta: f64, pairs: usize, head_dim: usize) -> Self {
        let frequencies = (0..pairs).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / (2 * pairs) as f32)).collect();
        Self { head_dim, frequencies, long: None, factor: 1.0 }
    }

    /// Cosines and sines of sequences, each its first position and how many rows it has.
    pub fn rotation(&self, sequences: &[(usize, usize)]) -> Rotation {
        let rows = sequences.iter().flat_map(|(first, n)| {
            let long = self.long.as_ref().filter(|long| first + n > long.context);
            let frequencies = long.map_or(&self.frequencies, |long| &long.frequencies);
            (*first..first + n).map(move |position| (position, frequencies.as_slice()))
        });
        Rotation::new(self.head_dim, self.factor, rows)
    }

    fn divide(&mut self, factor: f64) {
        self.frequencies.iter_mut().for_each(|f| *f /= factor as f32);
    }

    /// `factors` of the short and the long angles; `stretch` is how much longer the model's context has become.
    fn lengthen(
        &mut self,
        [short, long]: [Vec<f32>; 2],
        context: usize,
        stretch: f64,
        factor: Option<f64>,
    ) -> Result<(), ModelError> {
        let pairs = self.frequencies.len();
        if short.len() != pairs || long.len() != pairs || short.iter().chain(&long).any(|f| *f <= 0.0) {
            let (short, long) = (short.len(), long.len());
            return unsupported(format!(
                "longrope: {short} short and {long} long factors above 0, not {pairs} of each"
            ));
        }
        // As transformers multiplies: the factor by the inverse of the angle.
        let scaled = |factors: &[f32]| -> Vec<f32> {
            self.frequencies.iter().zip(factors).map(|(f, factor)| 1.0 / (factor * (1.0 / f))).collect()
        };
        (self.long, self.frequencies) = (Some(Long { context, frequencies: scaled(&long) }), scaled(&short));
        let own = if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / (context as f64).ln()).sqrt() };
        self.factor = factor.unwrap_or(own) as f32;
        Ok(())
    }

    fn lengthen_json(&mut self, scaling: &Value, config: &Value) -> Result<(), ModelError> {
        let factors = |k: &str| -> Vec<f32> {
            let values = scaling[k].as_array().into_iter().flatten();
            values.map(|x| x.as_f64().unwrap_or(0.0) as f32).collect()
        };
        let key = "original_max_position_embeddings";
        let original = scaling[key].as_u64().or(config[key].as_u64()).filter(|n| (2..1 << 24).contains(n));
        let Some(original) = original else { return unsupported(format!("longrope: {key} is missing")) };
        let longest = config["max_position_embeddings"].as_f64().unwrap_or(0.0);
        let stretch = scaling["factor"].as_f64().unwrap_or(longest / original as f64);
        let factors = [factors("short_factor"), factors("long_factor")];
        self.lengthen(factors, original as usize, stretch, scaling["attention_factor"].as_f64())
    }

    /// `rope_scaling` or `rope_parameters` of a config.json: `linear`, `llama3` and `longrope`.
    pub fn scale(&mut self, scaling: &Value, config: &Value) -> Result<(), ModelError> {
        let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
        let number = |k: &str| match scaling[k].as_f64() {
            Some(x) if x > 0.0 => Ok(x as f32),
            _ => unsupported(format!("rope scaling {kind}: {k} is missing or not positive")),
        };
        match kind {
            "default" => {}
            // Phi-3's first files call it `su`, and some `yarn`.
            "longrope" | "su" => self.lengthen_json(scaling, config)?,
            "yarn" if scaling["long_factor"].is_array() => self.lengthen_json(scaling, config)?,
            "linear" => self.divide(f64::from(number("factor")?)),
            "llama3" => {
                let (factor, low, high) = (number("factor")?, number("low_freq_factor")?, number("high_freq_factor")?);
                let original = number("original_max_position_embeddings")?;
                for f in &mut self.frequencies {
                    let wavelength = 2.0 * std::f32::consts::PI / *f;
                    // Long waves are stretched by the factor, short ones kept, those between mixed.
                    let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                    *f = (1.0 - smooth) * *f / factor + smooth * *f;
                }
            }
            other => {
                return unsupported(format!("rope scaling {other:?} is not one of default, linear, llama3, longrope"));
            }
        }
        Ok(())
    }

    /// The scaling that a GGUF names in its metadata and tensors.
    pub fn scale_gguf(&mut self, gguf: &Gguf, architecture: &str, context: usize) -> Result<(), ModelError> {
        let number = |k: &str| gguf.f64(&format!("{architecture}.rope.scaling.{k}"));
        match gguf.str(&format!("{architecture}.rope.scaling.type")).unwrap_or("none") {
            "none" | "longrope" => {}
            "linear" => self.divide(number("factor").unwrap_or(1.0)),
            other => return unsupported(format!("rope scaling {other:?} is not one of none, linear, longrope")),
        }
        if let Some(factors) = gguf.tensor("rope_freqs.weight") {
            let factors = factors.to_f32()?;
            if factors.len() != self.frequencies.len() {
                let (n, pairs) = (factors.len(), self.frequencies.len());
                return unsupported(format!("rope_freqs.weight has {n} factors, not {pairs}"));
            }
            self.frequencies.iter_mut().zip(factors).for_each(|(f, factor)| *f /= factor);
        }
        let tensors = ["short", "long"].map(|kind| gguf.tensor(&format!("rope_factors_{kind}.weight")));
        if let [Some(short), Some(long)] = tensors {
            let original = number("original_context_length").unwrap_or(context as f64);
            let factors = [short.to_f32()?, long.to_f32()?];
            self.lengthen(factors, original as usize, context as f64 / original, number("attn_factor"))?;
        }
        Ok(())
    }
}
