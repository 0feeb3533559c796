//! The loop itself: from rows to optimiser steps, evaluations and checkpoints.

use std::{cell::RefCell, sync::Arc, time::Instant};

use candle_core::{Var, backprop::GradStore};

use super::{
    Outcome, Run, TrainError, checkpoint,
    checkpoint::{Identity, Progress},
    eval::evaluate,
    experience::{Gathered, Place, World, gather},
    gradient::Gradient,
    live::Live,
    optim::{AdamW, Step},
    order,
    plan::Plan,
    rows::Rows,
    schedule::learning_rate,
};
use crate::{
    data::{Prompt, Row},
    domain::{Control, Metrics, Observer, TrainSpec, Training, spec::Precision},
    methods::{self, Start, Stepped, Trainable},
    model::{Base, Compute, Hook, Keep, Tape},
    objectives::{self, Figures, Models, Objective, Online},
};

pub struct Loop<'a> {
    spec: &'a TrainSpec,
    base: Arc<Base>,
    keep: Keep,
    rows: Rows<'a>,
    plan: Plan,
    identity: Identity,
    objective: &'a dyn Objective,
    world: Option<World<'a>>,
    live: Arc<Live>,
    /// The adapter that the run began with, where the objective is measured against it.
    reference: Option<Arc<dyn Hook>>,
    variables: Vec<(String, Var)>,
    optimiser: AdamW,
    progress: Progress,
    resumed: bool,
}

/// What one optimiser step's passes gave.
struct Passes {
    gradient: Gradient,
    loss: f64,
    hits: Option<(usize, usize)>,
    figures: Figures,
}

impl<'a> Loop<'a> {
    pub fn prepare(run: &Run<'a>, observer: &mut dyn Observer) -> Result<Self, TrainError> {
        let info = &run.base.info;
        let rows = Rows::choose(run, observer)?;
        let identity = Identity::new(run.spec, info, &rows.train, &rows.valid);
        let plan = Plan::new(&run.spec.training, rows.train.len());
        let mut method = method(run, &plan)?;
        let objective = objectives::of(&run.spec.objective);
        let reference = match run.start.filter(|_| objective.has_reference()) {
            Some(files) => Some(methods::load(files, &run.base.computing(Compute::F32))?),
            None => None,
        };
        let variables = method.variables();
        let mut optimiser = AdamW::new(&variables, run.spec.training.optimizer, run.spec.training.weight_decay);
        let mut progress = Progress { total_steps: plan.total_steps, ..Progress::default() };
        progress.metrics.total_steps = plan.total_steps;
        if let Some(snapshot) = run.resume {
            progress = checkpoint::progress(snapshot, &identity)?;
            checkpoint::restore(snapshot, method.as_mut(), &variables, &mut optimiser)?;
        }
        let (spec, base, keep) = (run.spec, run.base.computing(compute(run)), keep(&run.spec.training));
        let resumed = run.resume.is_some();
        Ok(Self {
            spec,
            base,
            keep,
            rows,
            plan,
            identity,
            objective,
            world: run.world,
            live: Arc::new(Live::new(progress.step, method)),
            reference,
            variables,
            optimiser,
            progress,
            resumed,
        })
    }

    /// To the end, or to where the observer says otherwise.
    pub fn run(mut self, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
        observer.begun(self.live.clone()).map_err(TrainError::Observer)?;
        if !self.resumed {
            self.checkpoint(observer)?;
        }
        while !self.is_done() {
            let metrics = self.step(observer)?;
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
            let text = format!("stopped early at step {}: {}", self.progress.step, self.why_early());
            observer.message("info", &text).map_err(TrainError::Observer)?;
        }
        Ok(Outcome::Finished { adapter: self.live.read().method.export()?, metrics: Box::new(self.progress.metrics) })
    }

    fn why_early(&self) -> String {
        match self.progress.too_far {
            None => "the validation loss no longer falls".to_owned(),
            Some((kl, most)) => {
                format!("its completions' divergence from the reference, {kl:.3}, is above max_kl, {most}")
            }
        }
    }

    fn is_done(&self) -> bool {
        let patience = self.spec.training.early_stopping.as_ref().map(|early| early.patience);
        self.progress.step >= self.plan.total_steps
            || self.progress.too_far.is_some()
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
    fn step(&mut self, observer: &mut dyn Observer) -> Result<Metrics, TrainError> {
        let begun = Instant::now();
        let index = self.progress.step;
        let (epoch, places) = self.plan.rows_of(index);
        let order = order::epoch(self.spec.seed, epoch, self.rows.train.len());
        let chosen: Vec<&Row> = order[places.clone()].iter().map(|row| self.rows.train[*row]).collect();
        let drawn = self.draw(index, &chosen)?;
        let mut figures = Figures::default();
        let rows: Vec<&Row> = match &drawn {
            Some(drawn) => {
                figures.merge(drawn.figures.clone());
                self.look(drawn, observer)?;
                drawn.rows.iter().collect()
            }
            None => chosen,
        };
        let rate = learning_rate(&self.spec.training, index, self.plan.total_steps);
        // Most objectives update once; the figures are those before the first.
        let mut before = None;
        // What went too far goes no further.
        let updates = if self.progress.too_far.is_some() { 0 } else { self.updates() };
        for again in 0..updates {
            let mut passes = self.passes(index, &rows)?;
            let norm = passes.gradient.norm();
            if !norm.is_finite() {
                return Err(diverged("gradient", norm, index + 1));
            }
            passes.gradient.clip(norm, self.spec.training.max_grad_norm);
            let step = index * self.updates() + again;
            let update = Step { t: step + 1, rate, peak: self.spec.training.learning_rate };
            let stepped = Stepped {
                step,
                total_steps: self.plan.total_steps * self.updates(),
                gradients: &passes.gradient.values,
            };
            let is_last = again + 1 == self.updates();
            self.live.change(|live| {
                self.optimiser.update(&self.variables, &passes.gradient, update, live.method.as_ref())?;
                live.method.stepped(&stepped)?;
                live.step += u64::from(is_last);
                Ok::<_, TrainError>(())
            })?;
            // 1 to rounding: the policy is still the one that drew.
            if let Some(ratio) = passes.figures.mean("ratio").filter(|_| again == 0) {
                figures.add("ratio/first", ratio);
            }
            figures.merge(passes.figures);
            before.get_or_insert((passes.loss, passes.hits, norm));
        }
        let (trained, tokens) = (sum(&rows, Row::trained), sum(&rows, Row::tokens));

        self.progress.step += 1;
        self.progress.epoch = epoch;
        self.progress.row = places.end as u64;
        self.progress.trained_tokens += trained;
        let mut metrics = Metrics {
            step: self.progress.step,
            total_steps: self.plan.total_steps,
            train_loss: before.map(|(loss, ..)| loss),
            train_mean_token_accuracy: before.and_then(|(_, hits, _)| hits).map(|(hits, of)| hits as f64 / of as f64),
            learning_rate: Some(rate),
            grad_norm: before.map(|(.., norm)| norm),
            tokens_per_second: Some(tokens as f64 / begun.elapsed().as_secs_f64()),
            trained_tokens: Some(self.progress.trained_tokens),
            epoch: Some(epoch as f64 + places.end as f64 / self.rows.train.len() as f64),
            figures: figures.means(),
            ..Metrics::default()
        };
        if self.is_evaluation_due(metrics.step) {
            self.evaluate(&mut metrics)?;
        }
        self.progress.metrics = metrics.clone();
        Ok(metrics)
    }

    /// Optimiser updates of one step.
    fn updates(&self) -> u64 {
        self.objective.online().map_or(1, |online| online.draw().num_iterations)
    }

    /// Says what has no reward; takes note of how far the policy went, and of the next step's weight of it.
    fn look(&mut self, drawn: &Gathered, observer: &mut dyn Observer) -> Result<(), TrainError> {
        if let Some(warning) = &drawn.warning {
            let text = format!("step {}: {warning}", self.progress.step + 1);
            observer.message("warn", &text).map_err(TrainError::Observer)?;
        }
        let (Some(online), Some(kl)) = (self.objective.online(), drawn.kl) else { return Ok(()) };
        self.progress.too_far = online.max_kl().filter(|most| kl > *most).map(|most| (kl, most));
        self.progress.kl_coef = Some(online.next_kl_coef(self.kl_coef(online), kl, drawn.rows.len()).to_bits());
        Ok(())
    }

    /// The weight of the divergence in the next step.
    fn kl_coef(&self, online: &dyn Online) -> f64 {
        self.progress.kl_coef.map_or_else(|| online.kl_coef(), f64::from_bits)
    }

    /// The completions that a step is over, for objectives that learn from them.
    fn draw(&self, index: u64, rows: &[&Row]) -> Result<Option<Gathered>, TrainError> {
        let Some(online) = self.objective.online() else { return Ok(None) };
        let Some(world) = &self.world else {
            return Err(TrainError::Data("there is nobody to draw completions from".to_owned()));
        };
        let prompts: Vec<&Prompt> = rows
            .iter()
            .filter_map(|row| match row {
                Row::Prompt(prompt) => Some(prompt),
                _ => None,
            })
            .collect();
        let place = Place { seed: self.spec.seed, step: index, kl_coef: self.kl_coef(online) };
        let tape = RefCell::new(Tape::new(self.keep));
        let live = self.live.read();
        let policy = live.method.export()?;
        gather(world, online, &policy, &self.models(live.method.as_ref(), None, &tape), &prompts, &place).map(Some)
    }

    /// Forward and backward over the micro-batches of one step. The units of the whole step are counted first: each
    /// weighs the same, however the rows are split.
    fn passes(&self, index: u64, rows: &[&Row]) -> Result<Passes, TrainError> {
        let live = self.live.read();
        let counts = self.objective.counts(rows);
        let gradient = Gradient::zero(&self.variables);
        let mut passes = Passes { gradient, loss: 0.0, hits: None, figures: Figures::default() };
        // A prompt's completions count as one row, as the prompt does.
        let batch =
            self.plan.batch_size * self.objective.online().map_or(1, |online| online.draw().num_generations as usize);
        let share = 1.0 / rows.len().div_ceil(batch) as f64;
        for (i, micro) in rows.chunks(batch).enumerate() {
            let key = order::pass_key(self.spec.seed, index, i as u64);
            let tape = RefCell::new(Tape::new(self.keep));
            let found = self.objective.pass(&self.models(live.method.as_ref(), Some(key), &tape), micro)?;
            let mut parts = Vec::with_capacity(counts.len() + 1);
            for (term, count) in found.terms.iter().zip(&counts) {
                if !term.value.is_finite() {
                    return Err(diverged("loss", term.value, index + 1));
                }
                passes.loss += term.value / count;
                parts.push(term.gradient.affine(1.0 / count, 0.0)?);
            }
            // A mean over passes, where the terms are means over the step's units.
            if let Some(penalty) = found.hook.penalty()? {
                passes.figures.add("penalty", f64::from(penalty.to_scalar::<f32>()?));
                parts.push(penalty.affine(share, 0.0)?);
            }
            if let Some((hits, of)) = found.hits {
                let (all, of_all) = passes.hits.unwrap_or_default();
                passes.hits = Some((all + hits, of_all + of));
            }
            for (name, value) in found.hook.figures() {
                passes.figures.add(name, value);
            }
            passes.figures.merge(found.figures);
            let sum = parts.into_iter().map(Ok).reduce(|sum, part| sum? + part?);
            if let Some(sum) = sum {
                let take = |found: &GradStore| passes.gradient.add(&self.variables, found);
                tape.into_inner().backward(&self.base, &sum?, take)?;
            }
        }
        Ok(passes)
    }

    fn models<'m>(&'m self, method: &'m dyn Trainable, train: Option<u64>, tape: &'m RefCell<Tape>) -> Models<'m> {
        Models {
            base: &self.base,
            method,
            reference: self.reference.as_ref(),
            train,
            tape,
            limit: self.spec.training.max_seq_len as usize,
        }
    }

    fn evaluate(&mut self, metrics: &mut Metrics) -> Result<(), TrainError> {
        let (tape, live) = (RefCell::new(Tape::new(self.keep)), self.live.clone());
        let live = live.read();
        evaluate(
            self.objective,
            &self.models(live.method.as_ref(), None, &tape),
            &self.rows.valid,
            self.plan.batch_size,
            metrics,
        )?;
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
        let live = self.live.read();
        let method = live.method.as_ref();
        let snapshot = checkpoint::write(&self.identity, &self.progress, method, &self.variables, &self.optimiser)?;
        observer.checkpoint(snapshot, &self.progress.metrics).map_err(TrainError::Observer)
    }
}

/// The run's adapter at its start, with the head that the objective trains, if it trains one.
pub fn method(run: &Run, plan: &Plan) -> Result<Box<dyn Trainable>, TrainError> {
    let method = match run.start {
        Some(files) => methods::resume(files, &run.base)?,
        None => {
            let updates = objectives::of(&run.spec.objective).online().map_or(1, |online| online.draw().num_iterations);
            let (seed, total_steps) = (run.spec.seed, plan.total_steps * updates);
            let tokenize = |text: &str| (run.tokenize)(text);
            let start = Start { base: &run.base, seed, total_steps, experts: run.experts, tokenize: &tokenize };
            methods::create(&run.spec.adapter, &start)?
        }
    };
    let method = match objectives::of(&run.spec.objective).online().and_then(|online| online.value_rate()) {
        Some(rate) => methods::value::over(method, &run.base, rate)?,
        None => method,
    };
    let there = run.start.map_or(Ok(None), methods::score::head)?;
    match (run.spec.objective.head(), there) {
        (None, None) => Ok(method),
        (Some(head), None) => Ok(methods::score::fresh(method, head, &run.base, run.spec.seed)?),
        (Some(head), Some(there)) if head == there => Ok(method),
        _ => Err(TrainError::Data(format!("{} cannot train on the adapter's head", run.spec.objective.type_name()))),
    }
}

pub fn compute(run: &Run) -> Compute {
    match run.spec.training.precision {
        Precision::Auto => run.base.auto_compute(),
        Precision::F32 => Compute::F32,
        Precision::Bf16 => Compute::Bf16,
    }
}

pub fn keep(training: &Training) -> Keep {
    if training.gradient_checkpointing { Keep::LayerInputs } else { Keep::Everything }
}

fn sum(rows: &[&Row], of: fn(&Row) -> usize) -> u64 {
    rows.iter().map(|row| of(row) as u64).sum()
}

fn diverged(what: &str, value: f64, step: u64) -> TrainError {
    TrainError::Diverged(format!("the {what} of step {step} is not finite ({value}); a lower learning rate may help"))
}
