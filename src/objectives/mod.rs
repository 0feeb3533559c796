//! What a run optimises: one file each.
//!
//! A loss is a sum of terms, each a sum over some unit (tokens, pairs) divided by how many of them the whole
//! optimiser step has: however the rows are split into micro-batches, each unit weighs the same.

pub mod dpo;
pub mod grade;
pub mod grpo;
pub mod ipo;
pub mod kto;
pub mod online;
pub mod orpo;
pub mod preference;
pub mod reward_model;
pub mod rloo;
pub mod score;
pub mod simpo;
pub mod supervised;

use std::{cell::RefCell, collections::BTreeMap, sync::Arc};

use candle_core::{Result, Tensor};

use crate::{
    data::Row,
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

    /// Whether it trains a score head over the method.
    fn has_score(&self) -> bool {
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

    /// What each completion of each group is better by than could be expected. `divergences` are the completions'
    /// summed `log π − log π_ref`, 0 without a reference.
    fn advantages(&self, rewards: &[Vec<f64>], divergences: &[Vec<f64>]) -> Vec<Vec<f64>>;
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
        ObjectiveSpec::Grpo(spec) | ObjectiveSpec::Reinforcement(spec) => spec,
        ObjectiveSpec::Rloo(spec) => spec,
    }
}

/// Means by name, gathered over passes: sums and how many values they are of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures(BTreeMap<String, (f64, f64)>);

impl Figures {
    pub fn add(&mut self, name: impl Into<String>, value: f64) {
        let (sum, count) = self.0.entry(name.into()).or_default();
        *sum += value;
        *count += 1.0;
    }

    pub fn merge(&mut self, other: Self) {
        for (name, (more, by)) in other.0 {
            let (sum, count) = self.0.entry(name).or_default();
            *sum += more;
            *count += by;
        }
    }

    /// The means; how far rewards stand apart follows from those of the two sides.
    pub fn means(&self) -> BTreeMap<String, f64> {
        let mut means: BTreeMap<String, f64> =
            self.0.iter().map(|(name, (sum, count))| (name.clone(), sum / count)).collect();
        if let (Some(chosen), Some(rejected)) = (means.get("rewards/chosen"), means.get("rewards/rejected")) {
            means.insert("rewards/margins".to_owned(), chosen - rejected);
        }
        means
    }
}
