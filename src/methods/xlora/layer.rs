//! X-LoRA's two passes (Buehler and Buehler, arXiv 2402.07148; PEFT's `tuners/xlora`).
//!
//! The first is over the base, without gradients; with `scaling_pass_value` v, each expert counts v in it. From its hidden
//! rows the classifier makes λ, and in the second `y = x Wᵀ + Σ_e λ_e · g · s_e · B_e A_e drop(x)`, `s_e` the expert's own
//! scale and `g` the `global_scaling_weight`. λ of a token depends on the tokens before it only, so that both passes can
//! be served from caches; PEFT computes the whole text again for each token, to the same numbers.

use std::sync::{Arc, Mutex};

use candle_core::{Result, Tensor};

use super::classifier::Classifier;
use crate::{
    domain::Site,
    methods::{dropout, lora::layer::LowRank},
    model::{At, Frozen, Hook, Linear, ops},
};

/// One expert's change of one linear.
pub struct Change {
    pub expert: usize,
    pub low_rank: LowRank,
    pub dropout: f64,
}

/// The experts at one linear.
#[derive(Default)]
pub struct Gated {
    /// The first of this linear's weights in a row of λ.
    pub first: usize,
    pub changes: Vec<Change>,
}

/// `[layer][site]`
pub type Experts = Vec<[Gated; Site::LAYER.len()]>;

/// An X-LoRA adapter before it knows λ. Without a first pass it is the base.
pub struct XLora {
    pub experts: Arc<Experts>,
    /// What the experts count in the first pass, without gradients.
    pub first: Option<(Arc<Experts>, f64)>,
    pub classifier: Arc<Classifier>,
    /// Each expert's mean weight in the pass, while training.
    pub shares: Option<Mutex<Vec<f64>>>,
}

impl Hook for XLora {
    fn first_pass(&self) -> Option<Arc<dyn Hook>> {
        Some(match &self.first {
            None => Arc::new(Frozen),
            Some((experts, weight)) => Arc::new(Mixed { experts: experts.clone(), weights: Weights::All(*weight) }),
        })
    }

    fn guided(&self, hidden: &Tensor, train: Option<u64>) -> Result<Arc<dyn Hook>> {
        let weights = self.classifier.scalings(hidden, train)?;
        if let Some(shares) = &self.shares {
            let experts = self.classifier.experts;
            let means = weights.detach().reshape(((), experts))?.mean(0)?.to_vec1::<f32>()?;
            *shares.lock().unwrap_or_else(|e| e.into_inner()) = means.into_iter().map(f64::from).collect();
        }
        let weights = weights.affine(self.classifier.spec.global_scaling_weight, 0.0)?;
        Ok(Arc::new(Mixed { experts: self.experts.clone(), weights: Weights::Rows(weights) }))
    }

    fn figures(&self) -> Vec<(String, f64)> {
        let Some(shares) = &self.shares else { return Vec::new() };
        let shares = shares.lock().unwrap_or_else(|e| e.into_inner());
        shares.iter().enumerate().map(|(e, share)| (format!("expert_share.{e}"), *share)).collect()
    }
}

enum Weights {
    All(f64),
    /// `(rows, L · E)`
    Rows(Tensor),
}

/// The experts of one pass with their weights.
struct Mixed {
    experts: Arc<Experts>,
    weights: Weights,
}

impl Hook for Mixed {
    fn adjust(&self, at: At, site: Site, x: &Tensor, mut y: Tensor, _: &Linear) -> Result<Tensor> {
        let Some(gated) = self.experts.get(at.layer).and_then(|sites| sites.get(site as usize)) else { return Ok(y) };
        for change in &gated.changes {
            let place = (at.layer * Site::LAYER.len() + site as usize) as u64;
            let dropped = dropout(x, change.dropout, at.train, place << 8 | change.expert as u64)?;
            let delta = change.low_rank.delta(dropped.as_ref().unwrap_or(x))?;
            let delta = match &self.weights {
                Weights::All(weight) => delta.affine(*weight, 0.0)?,
                Weights::Rows(rows) => delta.broadcast_mul(&rows.narrow(1, gated.first + change.expert, 1)?)?,
            };
            y = ops::add(&y, &delta)?;
        }
        Ok(y)
    }
}
