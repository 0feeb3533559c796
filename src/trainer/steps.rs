//! The loop itself: from rows to optimiser steps, evaluations and checkpoints.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use candle_core::Var;

use super::{
    Outcome, Run, TrainError, checkpoint,
    checkpoint::{Identity, Progress},
    eval::evaluate,
    optim::{AdamW, Gradient, Step},
    order,
    pass::cross_entropy,
    plan::Plan,
    rows::Rows,
    schedule::learning_rate,
};
use crate::{
    data::Example,
    domain::{Control, Metrics, Observer, TrainSpec, spec::Precision},
    methods::{self, Start, Stepped, Trainable},
    model::{Base, Compute},
};

pub struct Loop<'a> {
    spec: &'a TrainSpec,
    base: Arc<Base>,
    rows: Rows<'a>,
    plan: Plan,
    identity: Identity,
    method: Box<dyn Trainable>,
    variables: Vec<(String, Var)>,
    optimiser: AdamW,
    progress: Progress,
    resumed: bool,
}

/// What one optimiser step's passes gave.
struct Passes {
    gradient: Gradient,
    loss: f64,
    correct: usize,
    trained: usize,
    tokens: usize,
    figures: BTreeMap<String, f64>,
}

impl<'a> Loop<'a> {
    pub fn prepare(run: &Run<'a>, observer: &mut dyn Observer) -> Result<Self, TrainError> {
        let info = &run.base.info;
        let rows = Rows::choose(run, observer)?;
        let identity = Identity::new(run.spec, info, &rows.train, &rows.valid);
        let plan = Plan::new(&run.spec.training, rows.train.len());
        let mut method = match run.start {
            Some(files) => methods::resume(files, &run.base)?,
            None => {
                let (seed, total_steps) = (run.spec.seed, plan.total_steps);
                let start = Start { base: &run.base, seed, total_steps, tokenize: &|text| (run.tokenize)(text) };
                methods::create(&run.spec.adapter, &start)?
            }
        };
        let variables = method.variables();
        let mut optimiser = AdamW::new(&variables, run.spec.training.weight_decay);
        let mut progress = Progress { total_steps: plan.total_steps, ..Progress::default() };
        progress.metrics.total_steps = plan.total_steps;
        if let Some(snapshot) = run.resume {
            progress = checkpoint::progress(snapshot, &identity)?;
            checkpoint::restore(snapshot, method.as_mut(), &variables, &mut optimiser)?;
        }
        let compute = match run.spec.training.precision {
            Precision::Auto => run.base.auto_compute(),
            Precision::F32 => Compute::F32,
            Precision::Bf16 => Compute::Bf16,
        };
        let (spec, base) = (run.spec, run.base.computing(compute));
        let resumed = run.resume.is_some();
        Ok(Self { spec, base, rows, plan, identity, method, variables, optimiser, progress, resumed })
    }

    /// To the end, or to where the observer says otherwise.
    pub fn run(mut self, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
        if !self.resumed {
            self.checkpoint(observer)?;
        }
        while !self.is_done() {
            let metrics = self.step()?;
            let control = observer.step(&metrics).map_err(TrainError::Observer)?;
            if control == Control::Cancel {
                return Ok(Outcome::Cancelled);
            }
            let done = self.is_done();
            if control != Control::Continue || done || self.is_checkpoint_due() {
                self.checkpoint(observer)?;
            }
            match control {
                Control::Pause if !done => return Ok(Outcome::Paused),
                Control::Drain if !done => return Ok(Outcome::Drained),
                _ => {}
            }
        }
        if self.progress.step < self.plan.total_steps {
            let text = format!("stopped early at step {}: the validation loss no longer falls", self.progress.step);
            observer.message("info", &text).map_err(TrainError::Observer)?;
        }
        Ok(Outcome::Finished { adapter: self.method.export()?, metrics: Box::new(self.progress.metrics) })
    }

    fn is_done(&self) -> bool {
        let patience = self.spec.training.early_stopping.as_ref().map(|early| early.patience);
        self.progress.step >= self.plan.total_steps
            || patience.is_some_and(|patience| self.progress.evaluations_since_best >= patience)
    }

    fn is_checkpoint_due(&self) -> bool {
        let every = self.spec.training.checkpoint_every;
        self.plan.is_epoch_end(self.progress.step) || every.is_some_and(|n| self.progress.step.is_multiple_of(n))
    }

    fn is_evaluation_due(&self, step: u64) -> bool {
        let own = match self.spec.training.eval_every {
            Some(every) => step.is_multiple_of(every),
            None => self.plan.is_epoch_end(step),
        };
        !self.rows.valid.is_empty() && (own || step == self.plan.total_steps)
    }

    /// One optimiser step. The losses are those before the update; the validation figures, those after it.
    fn step(&mut self) -> Result<Metrics, TrainError> {
        let begun = Instant::now();
        let index = self.progress.step;
        let (epoch, places) = self.plan.rows_of(index);
        let order = order::epoch(self.spec.seed, epoch, self.rows.train.len());
        let chosen: Vec<&Example> = order[places.clone()].iter().map(|row| self.rows.train[*row]).collect();
        let mut passes = self.passes(index, &chosen)?;

        let norm = passes.gradient.norm();
        if !norm.is_finite() {
            return Err(diverged("gradient", norm, index + 1));
        }
        passes.gradient.clip(norm, self.spec.training.max_grad_norm);
        let rate = learning_rate(&self.spec.training, index, self.plan.total_steps);
        let update = Step { t: index + 1, rate };
        self.optimiser.update(&self.variables, &passes.gradient, update, self.method.as_ref())?;
        let (total_steps, gradients) = (self.plan.total_steps, passes.gradient.values.as_slice());
        self.method.stepped(&Stepped { step: index, total_steps, gradients })?;

        self.progress.step += 1;
        self.progress.epoch = epoch;
        self.progress.row = places.end as u64;
        self.progress.trained_tokens += passes.trained as u64;
        let mut metrics = Metrics {
            step: self.progress.step,
            total_steps: self.plan.total_steps,
            train_loss: Some(passes.loss),
            train_mean_token_accuracy: Some(passes.correct as f64 / passes.trained as f64),
            learning_rate: Some(rate),
            grad_norm: Some(norm),
            tokens_per_second: Some(passes.tokens as f64 / begun.elapsed().as_secs_f64()),
            trained_tokens: Some(self.progress.trained_tokens),
            epoch: Some(epoch as f64 + places.end as f64 / self.rows.train.len() as f64),
            figures: passes.figures,
            ..Metrics::default()
        };
        if self.is_evaluation_due(metrics.step) {
            self.evaluate(&mut metrics)?;
        }
        self.progress.metrics = metrics.clone();
        Ok(metrics)
    }

    /// Forward and backward over the micro-batches of one step. The tokens of the whole step are counted first: each
    /// weighs the same, however the rows are split.
    fn passes(&self, index: u64, rows: &[&Example]) -> Result<Passes, TrainError> {
        let trained: usize = rows.iter().map(|row| row.trained()).sum();
        let tokens = rows.iter().map(|row| row.ids.len()).sum();
        let gradient = Gradient::zero(&self.variables);
        let mut passes = Passes { gradient, loss: 0.0, correct: 0, trained, tokens, figures: BTreeMap::new() };
        let share = 1.0 / rows.len().div_ceil(self.plan.batch_size) as f64;
        for (i, micro) in rows.chunks(self.plan.batch_size).enumerate() {
            let key = order::pass_key(self.spec.seed, index, i as u64);
            let hook = self.method.hook(Some(key))?;
            let found = cross_entropy(&self.base, &hook, micro, Some(key))?;
            let loss = f64::from(found.loss.to_scalar::<f32>()?);
            if !loss.is_finite() {
                return Err(diverged("loss", loss, index + 1));
            }
            passes.loss += loss / trained as f64;
            passes.correct += found.correct;
            let mut objective = found.loss.affine(1.0 / trained as f64, 0.0)?;
            // A mean over passes, where the loss is one over tokens.
            if let Some(penalty) = hook.penalty()? {
                *passes.figures.entry("penalty".to_owned()).or_default() +=
                    share * f64::from(penalty.to_scalar::<f32>()?);
                objective = (objective + penalty.affine(share, 0.0)?)?;
            }
            for (name, value) in hook.figures() {
                *passes.figures.entry(name).or_default() += share * value;
            }
            passes.gradient.add(&self.variables, &objective.backward()?)?;
        }
        Ok(passes)
    }

    fn evaluate(&mut self, metrics: &mut Metrics) -> Result<(), TrainError> {
        evaluate(&self.base, self.method.as_ref(), &self.rows.valid, self.plan.batch_size, metrics)?;
        let Some(loss) = metrics.full_valid_loss else { return Ok(()) };
        if !loss.is_finite() {
            return Err(diverged("validation loss", loss, metrics.step));
        }
        if self.progress.best.is_none_or(|best| loss < f64::from_bits(best)) {
            self.progress.best = Some(loss.to_bits());
            self.progress.evaluations_since_best = 0;
        } else {
            self.progress.evaluations_since_best += 1;
        }
        Ok(())
    }

    fn checkpoint(&self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let method = self.method.as_ref();
        let snapshot = checkpoint::write(&self.identity, &self.progress, method, &self.variables, &self.optimiser)?;
        observer.checkpoint(snapshot, &self.progress.metrics).map_err(TrainError::Observer)
    }
}

fn diverged(what: &str, value: f64, step: u64) -> TrainError {
    TrainError::Diverged(format!("the {what} of step {step} is not finite ({value}); a lower learning rate may help"))
}
