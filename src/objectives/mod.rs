//! What a run optimises: one file each.
//!
//! A loss is a sum of terms, each a sum over some unit (tokens, pairs) divided by how many of them the whole
//! optimiser step has: however the rows are split into micro-batches, each unit weighs the same.

pub mod classification;
pub mod dpo;
pub mod grade;
pub mod grpo;
pub mod ipo;
pub mod kto;
pub mod laid;
pub mod online;
pub mod orpo;
pub mod ppo;
pub mod preference;
pub mod reward_model;
pub mod rloo;
pub mod score;
pub mod simpo;
pub mod supervised;

use std::{cell::RefCell, collections::BTreeMap, sync::Arc};

use candle_core::{Result, Tensor};

use crate::{
    data::{Row, Worth},
    domain::{ObjectiveSpec, spec::Draw},
    methods::Trainable,
    model::{Base, Batch, Hook, Tape},
};

/// What a pass runs on.
pub struct Models<'a> {
    pub base: &'a Base,
    /// The policy: the base with the adapter that is trained.
    pub method: &'a dyn Trainable,
    /// The adapter that the policy is measured against; none is the base itself.
    pub reference: Option<&'a Arc<dyn Hook>>,
    /// The key of this pass's random numbers while training, none while evaluating.
    pub train: Option<u64>,
    /// Where passes with gradients are noted.
    pub tape: &'a RefCell<Tape>,
    /// The longest text, in tokens.
    pub limit: usize,
}

impl Models<'_> {
    /// Hidden rows with gradients.
    pub fn forward(&self, batch: Batch) -> Result<Tensor> {
        self.tape.borrow_mut().forward(self.base, batch)
    }
}

/// One term of the loss over some rows, not yet divided.
pub struct Term {
    pub value: f64,
    /// A scalar whose gradient is the term's. Its value need not be.
    pub gradient: Tensor,
}

/// What a pass over some rows gave.
pub struct Found {
    /// In the order of `Objective::counts`.
    pub terms: Vec<Term>,
    pub figures: Figures,
    /// Trained tokens that the policy predicts (argmax), of how many; none where that says nothing.
    pub hits: Option<(usize, usize)>,
    /// The policy's hook, which the rows went through: it may have a penalty and figures of its own.
    pub hook: Arc<dyn Hook>,
}

pub trait Objective: Send + Sync {
    /// How many units each term of the loss has in these rows.
    fn counts(&self, rows: &[&Row]) -> Vec<f64>;

    /// Whether it is measured against where the run began.
    fn has_reference(&self) -> bool {
        false
    }

    /// Itself, where it learns from the model's own completions: its passes are then over those.
    fn online(&self) -> Option<&dyn Online> {
        None
    }

    /// Forward over the rows of a micro-batch. They are of the kind that the spec names.
    fn pass(&self, models: &Models, rows: &[&Row]) -> Result<Found>;
}

/// What learns from the model's own completions.
pub trait Online: Objective {
    fn draw(&self) -> Draw;

    /// What each completion is credited with: those of one prompt are a group, and follow each other.
    fn credit(&self, groups: &[Vec<Drawn>], kl_coef: f64) -> Vec<Credit>;

    /// Whether log-probabilities under the policy that drew are needed apart from an update's.
    fn reads_policy(&self) -> bool {
        self.draw().num_iterations > 1 || self.has_reference() || self.value_rate().is_some()
    }

    /// The divergence from the reference at which the run ends.
    fn max_kl(&self) -> Option<f64>;

    /// The divergence's weight in the first step.
    fn kl_coef(&self) -> f64;

    /// Its weight in the step after one of `n` completions at this divergence.
    fn next_kl_coef(&self, kl_coef: f64, kl: f64, n: usize) -> f64 {
        let _ = (kl, n);
        kl_coef
    }

    /// The learning rate of its value head as a multiple of the run's; none where it trains no value head.
    fn value_rate(&self) -> Option<f64> {
        None
    }
}

/// A completion with its reward, and what the models say of its tokens before the step's first update.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    pub reward: f64,
    /// Ended by itself, and not by the limit.
    pub is_ended: bool,
    /// `log π` of each token; empty where nothing needs it.
    pub old: Vec<f64>,
    /// `log π_ref`; empty without a reference.
    pub reference: Vec<f64>,
    /// The value head's; empty without one.
    pub values: Vec<f64>,
}

impl Drawn {
    /// `log π − log π_ref` of each token; nothing without a reference.
    pub fn log_ratios(&self) -> impl Iterator<Item = f64> + '_ {
        self.old.iter().zip(&self.reference).map(|(old, reference)| old - reference)
    }
}

/// What a completion is better by than could be expected: as a whole, or token by token with a value head.
#[derive(Clone, Debug, PartialEq)]
pub struct Credit {
    pub advantage: f64,
    pub worth: Vec<Worth>,
}

impl From<f64> for Credit {
    fn from(advantage: f64) -> Self {
        Self { advantage, worth: Vec::new() }
    }
}

pub fn of(spec: &ObjectiveSpec) -> &dyn Objective {
    match spec {
        ObjectiveSpec::Supervised(spec) => spec,
        ObjectiveSpec::Dpo(spec) => spec,
        ObjectiveSpec::Ipo(spec) => spec,
        ObjectiveSpec::Kto(spec) => spec,
        ObjectiveSpec::Orpo(spec) => spec,
        ObjectiveSpec::Simpo(spec) => spec,
        ObjectiveSpec::RewardModel(spec) => spec,
        ObjectiveSpec::SequenceClassification(spec) => spec,
        ObjectiveSpec::TokenClassification(spec) => spec,
        ObjectiveSpec::Grpo(spec) | ObjectiveSpec::Reinforcement(spec) => spec,
        ObjectiveSpec::Rloo(spec) => spec,
        ObjectiveSpec::Ppo(spec) => spec,
    }
}

/// What passes report by name, gathered over all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Sums and how many values they are of.
    sums: BTreeMap<String, (f64, f64)>,
    /// Of each class: how often it was said rightly, how often it was said, how often it was right.
    tallies: BTreeMap<String, [u64; 3]>,
}

impl Figures {
    pub fn add(&mut self, name: impl Into<String>, value: f64) {
        self.add_many(name, value, 1);
    }

    /// Many values at once, by their sum.
    pub fn add_many(&mut self, name: impl Into<String>, more: f64, by: usize) {
        let (sum, count) = self.sums.entry(name.into()).or_default();
        *sum += more;
        *count += by as f64;
    }

    /// Whether a class was said and right, was said, and was right.
    pub fn tally(&mut self, class: &str, of: [bool; 3]) {
        let tally = self.tallies.entry(class.to_owned()).or_default();
        tally.iter_mut().zip(of).for_each(|(count, is)| *count += u64::from(is));
    }

    pub fn merge(&mut self, other: Self) {
        for (name, (more, by)) in other.sums {
            let (sum, count) = self.sums.entry(name).or_default();
            *sum += more;
            *count += by;
        }
        for (class, more) in other.tallies {
            let tally = self.tallies.entry(class).or_default();
            tally.iter_mut().zip(more).for_each(|(count, more)| *count += more);
        }
    }

    /// One mean.
    pub fn mean(&self, name: &str) -> Option<f64> {
        self.sums.get(name).map(|(sum, count)| sum / count)
    }

    /// The means; how far rewards stand apart follows from those of the two sides, and F1 from the tallies.
    pub fn means(&self) -> BTreeMap<String, f64> {
        let mut means: BTreeMap<String, f64> =
            self.sums.iter().map(|(name, (sum, count))| (name.clone(), sum / count)).collect();
        if let (Some(chosen), Some(rejected)) = (means.get("rewards/chosen"), means.get("rewards/rejected")) {
            means.insert("rewards/margins".to_owned(), chosen - rejected);
        }
        let f1 = |[hits, said, right]: &[u64; 3]| 2.0 * *hits as f64 / (said + right) as f64;
        if !self.tallies.is_empty() {
            means.insert("f1".to_owned(), self.tallies.values().map(f1).sum::<f64>() / self.tallies.len() as f64);
        }
        means
    }
}
