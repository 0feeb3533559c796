//! The balance of experts over one pass, and what users see of it. Batches have no padding, so every row counts.

use std::sync::{Mutex, MutexGuard};

use candle_core::{Device, Result, Tensor};

use super::router::{Choice, Scores};
use crate::model::Taken;

/// `E · Σ_e f_e · P_e` (Fedus et al., arXiv 2101.03961, in Mixtral's form): f is the number of a row's choices that
/// fall on an expert, mean over rows, and P the mean of `importance: (rows, E)`. With k choices a row, all alike, it
/// is k.
pub fn switch_balance(importance: &Tensor, choice: &Choice) -> Result<Tensor> {
    let (rows, experts) = importance.dims2()?;
    let share = |e: usize| match &choice.active {
        None => 1.0,
        Some(active) => active.iter().skip(e).step_by(experts).filter(|a| **a).count() as f32 / rows as f32,
    };
    let shares: Vec<f32> = (0..experts).map(share).collect();
    let shares = Tensor::from_vec(shares, experts, importance.device())?;
    (importance.mean(0)? * shares)?.sum_all()?.affine(experts as f64, 0.0)
}

#[derive(Default)]
struct Sums {
    routers: usize,
    entropy: f64,
    active: f64,
    /// Of each expert: its part of all choices, over the routers that have it.
    shares: Vec<(f64, usize)>,
}

/// What the routers of one pass chose.
pub struct Tally {
    coefficient: f64,
    balances: Taken,
    sums: Mutex<Sums>,
}

impl Tally {
    pub fn new(coefficient: f64) -> Self {
        Self { coefficient, balances: Taken::default(), sums: Mutex::default() }
    }

    fn sums(&self) -> MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Of each router.
    pub fn balances(&self) -> &Taken {
        &self.balances
    }

    pub fn note(&self, scores: &Scores, choice: &Choice, balance: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if self.coefficient != 0.0 {
            self.balances.push(balance()?);
        }
        let mut sums = self.sums();
        let rows = scores.values.len().max(1) as f64;
        let experts = scores.values.first().map_or(1, Vec::len);
        let mut counts = vec![0usize; experts];
        match &choice.active {
            None => counts.fill(scores.values.len()),
            Some(active) => {
                let places = active.iter().enumerate().filter(|(_, active)| **active);
                places.for_each(|(place, _)| counts[place % experts] += 1);
            }
        }
        let all = counts.iter().sum::<usize>() as f64;
        let information = |p: &f32| if *p > 0.0 { -f64::from(*p) * f64::from(*p).ln() } else { 0.0 };
        sums.routers += 1;
        sums.entropy += scores.values.iter().flatten().map(information).sum::<f64>() / rows;
        sums.active += all / rows;
        if sums.shares.len() < experts {
            sums.shares.resize(experts, (0.0, 0));
        }
        for ((share, routers), count) in sums.shares.iter_mut().zip(counts) {
            *share += count as f64 / all.max(1.0);
            *routers += 1;
        }
        Ok(())
    }

    /// The mean over routers, times the coefficient.
    pub fn penalty(&self) -> Result<Option<Tensor>> {
        let balances = self.balances.all();
        if balances.is_empty() {
            return Ok(None);
        }
        Tensor::stack(&balances, 0)?.mean(0)?.affine(self.coefficient, 0.0)?.to_device(&Device::Cpu).map(Some)
    }

    /// The routers' mean entropy in nats, the experts that a row has at work, and each expert's part of the choices.
    pub fn figures(&self) -> Vec<(String, f64)> {
        let sums = self.sums();
        if sums.routers == 0 {
            return Vec::new();
        }
        let routers = sums.routers as f64;
        let means = [("router_entropy", sums.entropy / routers), ("experts_per_token", sums.active / routers)];
        let shares = sums.shares.iter().enumerate();
        let shares = shares.map(|(e, (share, routers))| (format!("expert_share.{e}"), share / *routers as f64));
        means.map(|(name, value)| (name.to_owned(), value)).into_iter().chain(shares).collect()
    }
}
