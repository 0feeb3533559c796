//! The balance of experts over one pass, and what users see of it. Batches have no padding, so every row counts.

use std::sync::{Mutex, MutexGuard};

use candle_core::{Device, Result, Tensor};

use super::router::{Choice, Scores};

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
    balances: Vec<Tensor>,
    entropy: f64,
    active: f64,
    /// Of each expert: its part of all choices, over the routers that have it.
    shares: Vec<(f64, usize)>,
}

/// What the routers of one pass chose.
pub struct Tally {
    coefficient: f64,
    /// None while layers run again for their gradients: nothing counts twice.
    sums: Option<Mutex<Sums>>,
}

impl Tally {
    pub fn new(coefficient: f64) -> Self {
        Self { coefficient, sums: Some(Mutex::default()) }
    }

    /// One that notes nothing.
    pub fn silent() -> Self {
        Self { coefficient: 0.0, sums: None }
    }

    fn sums(&self) -> Option<MutexGuard<'_, Sums>> {
        self.sums.as_ref().map(|sums| sums.lock().unwrap_or_else(|e| e.into_inner()))
    }

    pub fn note(&self, balance: Tensor, scores: &Scores, choice: &Choice) {
        let Some(mut sums) = self.sums() else { return };
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
        sums.balances.push(balance);
        sums.entropy += scores.values.iter().flatten().map(information).sum::<f64>() / rows;
        sums.active += all / rows;
        if sums.shares.len() < experts {
            sums.shares.resize(experts, (0.0, 0));
        }
        for ((share, routers), count) in sums.shares.iter_mut().zip(counts) {
            *share += count as f64 / all.max(1.0);
            *routers += 1;
        }
    }

    /// The mean over routers, times the coefficient.
    pub fn penalty(&self) -> Result<Option<Tensor>> {
        let Some(sums) = self.sums() else { return Ok(None) };
        if sums.balances.is_empty() || self.coefficient == 0.0 {
            return Ok(None);
        }
        Tensor::stack(&sums.balances, 0)?.mean(0)?.affine(self.coefficient, 0.0)?.to_device(&Device::Cpu).map(Some)
    }

    /// The routers' mean entropy in nats, the experts that a row has at work, and each expert's part of the choices.
    pub fn figures(&self) -> Vec<(String, f64)> {
        let Some(sums) = self.sums() else { return Vec::new() };
        if sums.balances.is_empty() {
            return Vec::new();
        }
        let routers = sums.balances.len() as f64;
        let means = [("router_entropy", sums.entropy / routers), ("experts_per_token", sums.active / routers)];
        let shares = sums.shares.iter().enumerate();
        let shares = shares.map(|(e, (share, routers))| (format!("expert_share.{e}"), share / *routers as f64));
        means.map(|(name, value)| (name.to_owned(), value)).into_iter().chain(shares).collect()
    }
}
