//! Proximal policy optimisation (Schulman et al., arXiv 1707.06347; TRL 0.24's `ppo_trainer.py`).
//!
//! Token `t` of a completion of `n` tokens has the reward `R_t = −β(log π_old − log π_ref) + [t = n]·score`. With the
//! value head's `V`, 0 after the end: `δ_t = R_t + γV_{t+1} − V_t`, `A_t = δ_t + γλA_{t+1}`, `G_t = A_t + V_t`; then A is
//! whitened over the tokens of the step. A token's loss is `−min(ρA, clip(ρ, 1±ε)A)` and, times `vf_coef`,
//! `½max((V − G)², (clip(V, V_old ± ε_v) − G)²)`, mean over the step's tokens. β is fixed, or steered (Ziegler et al.,
//! arXiv 1909.08593).

use candle_core::{Device, Result, Tensor};

use super::{
    Credit, Drawn, Found, Models, Objective, Online, Term,
    online::{Judged, Tokens, clipped, moments, of_policy, sampled, temperature, texts},
    score::{score_with_values, split},
};
use crate::{
    data::{Row, Worth},
    domain::spec::{Draw, PpoSpec},
};

impl Objective for PpoSpec {
    /// Tokens, of the policy's loss and of the value head's.
    fn counts(&self, rows: &[&Row]) -> Vec<f64> {
        vec![rows.iter().map(|row| row.trained()).sum::<usize>() as f64; 2]
    }

    fn has_reference(&self) -> bool {
        self.kl_coef > 0.0 || self.max_kl.is_some()
    }

    fn online(&self) -> Option<&dyn Online> {
        Some(self)
    }

    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found> {
        let Some(head) = models.method.value_head() else { candle_core::bail!("ppo runs without a value head") };
        let sampled = sampled(rows);
        let (texts, hook) = (texts(&sampled), models.method.hook(None)?);
        let (scored, values) = score_with_values(models, &hook, &texts, temperature(&sampled), head.as_tensor())?;
        let (term, mut figures) = of_policy(&scored, &sampled, |tokens| judge(self, tokens), |_| 1.0)?;
        let (mut value, mut slopes) = (0.0, Vec::new());
        for (sampled, values) in sampled.iter().zip(split(&texts, &values)?) {
            for (worth, now) in sampled.worth.iter().zip(values) {
                let (loss, slope, is_clipped) = value_loss(self, worth, now);
                value += self.vf_coef * loss;
                slopes.push((self.vf_coef * slope) as f32);
                figures.add("loss/value_avg", loss);
                figures.add("val/clipfrac_avg", f64::from(u8::from(is_clipped)));
            }
        }
        let gradient = (values * Tensor::new(slopes, &Device::Cpu)?)?.sum_all()?;
        Ok(Found { terms: vec![term, Term { value, gradient }], figures, hits: None, hook })
    }
}

impl Online for PpoSpec {
    fn draw(&self) -> Draw {
        PpoSpec::draw(self)
    }

    fn credit(&self, groups: &[Vec<Drawn>], kl_coef: f64) -> Vec<Credit> {
        let drawn: Vec<&Drawn> = groups.iter().flatten().collect();
        let mut rewards: Vec<Vec<f64>> = drawn.iter().map(|drawn| rewards(self, drawn, kl_coef)).collect();
        if self.whiten_rewards {
            let (mean, _) = moments(&rewards.concat());
            whiten(&mut rewards);
            rewards.iter_mut().flatten().for_each(|reward| *reward += mean);
        }
        let mut advantages: Vec<Vec<f64>> =
            rewards.iter().zip(&drawn).map(|(rewards, drawn)| gae(self, rewards, &drawn.values)).collect();
        let returns: Vec<Vec<f64>> = (advantages.iter().zip(&drawn))
            .map(|(advantages, drawn)| advantages.iter().zip(&drawn.values).map(|(a, v)| a + v).collect())
            .collect();
        whiten(&mut advantages);
        let credit = |i: usize| {
            let tokens = advantages[i].iter().zip(&returns[i]).zip(&drawn[i].values);
            let worth = |((a, g), v): ((&f64, &f64), &f64)| Worth { advantage: *a, returned: *g, value: *v };
            Credit { advantage: 0.0, worth: tokens.map(worth).collect() }
        };
        (0..drawn.len()).map(credit).collect()
    }

    fn max_kl(&self) -> Option<f64> {
        self.max_kl
    }

    fn kl_coef(&self) -> f64 {
        self.kl_coef
    }

    fn next_kl_coef(&self, kl_coef: f64, kl: f64, n: usize) -> f64 {
        let Some(target) = self.kl_target else { return kl_coef };
        let error = (kl / target - 1.0).clamp(-0.2, 0.2);
        kl_coef * (1.0 + error * n as f64 / self.kl_horizon as f64)
    }

    fn value_rate(&self) -> Option<f64> {
        Some(self.vf_learning_rate_multiplier)
    }
}

/// `R_t`: the score stands at the last token, the one that ends the completion if there is one.
pub fn rewards(spec: &PpoSpec, drawn: &Drawn, kl_coef: f64) -> Vec<f64> {
    let penalty = spec.missing_eos_penalty.filter(|_| !drawn.is_ended).unwrap_or(0.0);
    let mut rewards: Vec<f64> = match drawn.reference.is_empty() {
        true => vec![0.0; drawn.values.len()],
        false => drawn.log_ratios().map(|apart| -kl_coef * apart).collect(),
    };
    if let Some(last) = rewards.last_mut() {
        *last += drawn.reward - penalty;
    }
    rewards
}

/// Generalised advantage estimation (Schulman et al., arXiv 1506.02438).
pub fn gae(spec: &PpoSpec, rewards: &[f64], values: &[f64]) -> Vec<f64> {
    let (mut next, mut advantage) = (0.0, 0.0);
    let mut advantages: Vec<f64> = (rewards.iter().zip(values).rev())
        .map(|(reward, value)| {
            let delta = reward + spec.gamma * next - value;
            (next, advantage) = (*value, delta + spec.gamma * spec.lam * advantage);
            advantage
        })
        .collect();
    advantages.reverse();
    advantages
}

/// Mean 0 and deviation 1 over all tokens: `(x − μ)/√(σ² + 1e-8)`, σ² with n − 1.
pub fn whiten(values: &mut [Vec<f64>]) {
    let (mean, deviation) = moments(&values.concat());
    let scale = (deviation * deviation + 1e-8).sqrt();
    values.iter_mut().flatten().for_each(|value| *value = (*value - mean) / scale);
}

pub fn judge(spec: &PpoSpec, tokens: Tokens) -> Judged {
    let mut many = 0;
    let token = |((policy, old), worth): ((&f64, &f64), &Worth)| {
        let (loss, slope, is_clipped) = clipped(policy - old, worth.advantage, spec.cliprange);
        many += usize::from(is_clipped);
        (loss, slope)
    };
    let losses: Vec<_> = tokens.policy.iter().zip(tokens.old).zip(tokens.worth).map(token).collect();
    Judged { clipped: (many, losses.len()), losses }
}

/// The value's loss (without its weight), its slope in the value, and whether the clipped side counts.
pub fn value_loss(spec: &PpoSpec, worth: &Worth, value: f64) -> (f64, f64, bool) {
    let near = value.clamp(worth.value - spec.cliprange_value, worth.value + spec.cliprange_value);
    let (free, bound) = (value - worth.returned, near - worth.returned);
    if free * free >= bound * bound { (0.5 * free * free, free, false) } else { (0.5 * bound * bound, 0.0, true) }
}
