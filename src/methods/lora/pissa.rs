//! PiSSA (Meng et al., arXiv 2404.02948): A and B begin as the principal part of W and learn instead of noise.
//!
//! `W ≈ U S Vᵀ` of rank r, `A₀ = √(S/s) Vᵀ`, `B₀ = U √(S/s)`. The paper takes `s·B₀A₀` out of the base; our base is
//! shared and frozen, so the adapter is the difference: `y = W x + s (B A − B₀ A₀) x`, the same function with the same
//! gradients. That is LoRA with `A' = [A; A₀]`, `B' = [B, −B₀]` and twice the rank and alpha, and so it is stored: any
//! reader of LoRA files serves it, and an adapter that is continued goes on as that LoRA.
//!
//! On a quantised base W is the dequantised matrix. PEFT refuses that, because it would have to quantise the residual
//! again; nothing is quantised here, so the start is exact. The base's own quantisation error stays what it is: the
//! paper's smaller error of a residual that is quantised after the decomposition (QPiSSA) is not to be had this way.

use std::sync::Arc;

use candle_core::{Device, Result as Candle, Tensor, Var};

use super::{
    Places, config, rate,
    svd::{self, Matrix},
};
use crate::{
    domain::{
        BaseInfo, LoraSpec, Site, rng,
        spec::{LoraInit, LoraInitName, LoraTarget},
    },
    methods::{AdapterFiles, MethodError, Named, Start, Trainable, file},
    model::{Hook, Linear},
};

struct Training {
    spec: LoraSpec,
    /// The LoRA of twice the rank that the result is.
    stored: LoraSpec,
    places: Places,
    base: BaseInfo,
    /// A and B of each target, then what is saved.
    variables: Vec<(String, Var)>,
    /// A₀ and B₀.
    starts: Vec<Tensor>,
}

/// A fresh adapter, and the base itself at first.
pub fn create(spec: &LoraSpec, places: Places, start: &Start) -> Result<Box<dyn Trainable>, MethodError> {
    let (info, targets) = (&start.base.info, &places.targets);
    let mut values = Vec::with_capacity(2 * targets.len());
    for target in targets {
        if target.site == Site::Embed {
            return Err(MethodError::Unsupported("embed_tokens cannot begin as pissa".into()));
        }
        let linear = start.base.linear(target.layer, target.site);
        let (a, b) = principal(&spec.init_lora_weights, target, linear, start.seed)?;
        values.extend([a, b]);
    }
    values.extend(places.saved.values(start.base)?);
    let variables = file::variables(places.names(info), values)?;
    let pairs = variables.iter().take(2 * targets.len());
    let starts = pairs.map(|(_, variable)| variable.as_tensor().detach().copy()).collect::<Candle<Vec<_>>>()?;
    let stored = doubled(spec);
    let places = Places::new(&stored, info)?;
    Ok(Box::new(Training { spec: spec.clone(), stored, places, base: info.clone(), variables, starts }))
}

/// `(A₀, B₀)`, row by row.
fn principal(
    init: &LoraInit,
    target: &LoraTarget,
    linear: &Linear,
    seed: u64,
) -> Result<(Vec<f32>, Vec<f32>), MethodError> {
    let (outputs, inputs) = linear.shape();
    let w = linear.dequantize()?.flatten_all()?.to_vec1::<f32>()?;
    let w = Matrix::new(outputs, inputs, w.into_iter().map(f64::from).collect());
    let found = match init {
        LoraInit::Named(LoraInitName::PissaNiter(rounds)) => {
            let seed = rng::key(seed, &[target.layer as u64, target.site as u64]);
            svd::randomised(&w, target.r, *rounds, seed)
        }
        _ => svd::exact(&w, target.r),
    };
    let roots: Vec<f64> = found.s.iter().map(|s| (s / target.scale).sqrt()).collect();
    let a = found.v.data.chunks(inputs).zip(&roots).flat_map(|(v, root)| v.iter().map(move |x| (x * root) as f32));
    let b =
        (0..outputs).flat_map(|o| found.u.data.chunks(outputs).zip(&roots).map(move |(u, root)| (u[o] * root) as f32));
    Ok((a.collect(), b.collect()))
}

/// Twice the rank at the same scale.
fn doubled(spec: &LoraSpec) -> LoraSpec {
    let factor = if spec.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    let mut stored = spec.clone();
    stored.r *= 2;
    stored.lora_alpha *= factor;
    stored.rank_pattern.values_mut().for_each(|r| *r *= 2);
    stored.alpha_pattern.values_mut().for_each(|alpha| *alpha *= factor);
    stored.init_lora_weights = LoraInit::Flag(true);
    stored
}

impl Training {
    /// A' and B' of each target, in the graph of A and B, then what is saved.
    fn tensors(&self) -> Candle<Vec<Tensor>> {
        let (variables, starts) = (self.variables.chunks_exact(2), self.starts.chunks_exact(2));
        let mut tensors = Vec::with_capacity(self.variables.len());
        for (pair, start) in variables.zip(starts) {
            tensors.push(Tensor::cat(&[pair[0].1.as_tensor(), &start[0]], 0)?);
            tensors.push(Tensor::cat(&[pair[1].1.as_tensor(), &start[1].neg()?], 1)?.contiguous()?);
        }
        let saved = &self.variables[self.starts.len()..];
        tensors.extend(saved.iter().map(|(_, variable)| variable.as_tensor().clone()));
        Ok(tensors)
    }
}

impl Trainable for Training {
    fn hook(&self, train: Option<u64>) -> Candle<Arc<dyn Hook>> {
        Ok(Arc::new(self.places.hook(&self.stored, &self.base, &self.tensors()?, train)))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn rate(&self, name: &str, peak: f64) -> f64 {
        rate(&self.spec, name, peak)
    }

    /// The start: decomposed again on another machine, its last bits could differ.
    fn state(&self) -> Vec<Named> {
        let named = self.variables.iter().zip(&self.starts).filter_map(|((name, _), start)| {
            Some((name.clone(), start.dims().to_vec(), start.flatten_all().ok()?.to_vec1().ok()?))
        });
        named.collect()
    }

    fn restore(&mut self, state: Vec<Named>) -> Result<(), MethodError> {
        if state.len() != self.starts.len() {
            let (found, wanted) = (state.len(), self.starts.len());
            return Err(MethodError::Mismatch(format!("the start has {found} tensors, not {wanted}")));
        }
        for (name, shape, values) in state {
            let place = self.variables.iter().position(|(known, _)| *known == name);
            let Some(place) = place.filter(|place| self.starts[*place].dims() == shape) else {
                return Err(MethodError::Mismatch(format!("the start's {name} {shape:?} belongs to no variable")));
            };
            self.starts[place] = Tensor::from_vec(values, shape, &Device::Cpu)?;
        }
        Ok(())
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let named = self
            .places
            .names(&self.base)
            .into_iter()
            .zip(self.tensors()?)
            .map(|((name, shape), tensor)| Ok((name, shape, tensor.flatten_all()?.to_vec1::<f32>()?)))
            .collect::<Candle<Vec<Named>>>()?;
        let config = file::config_bytes(&config::write(&self.stored, &self.base));
        Ok(AdapterFiles { config, weights: file::tensor_bytes(&named) })
    }
}
