//! What a run will need: counted from its rows, and measured on short passes of its own method over its own base.

mod memory;
mod probe;

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Run, TrainError, on_a_large_stack, order, plan::Plan, rows::Rows, steps};
use crate::{
    data::Row,
    domain::{Control, MemoryEstimate, Metrics, Observer, RunEstimate, Saving, Snapshot, Training, spec::Optimizer},
    model::{Base, Hook},
    objectives::{self, laid::Laid},
};
use memory::memory;
use probe::Probe;

/// Tokens of a pass that is timed: enough for the kernels to be as fast as they get, few enough not to be waited for.
const TIMED: usize = 128;

/// Looks at every row, and runs a few very short passes.
pub fn estimate(run: &Run) -> Result<RunEstimate, TrainError> {
    on_a_large_stack(|| measure(run))
}

/// Tokens a second that training goes through, by one pass over the base.
pub fn speed(run: &Run) -> Result<f64, TrainError> {
    on_a_large_stack(|| {
        let rows = Rows::choose(run, &mut Silent)?;
        let method = steps::method(run, &Plan::new(&run.spec.training, rows.train.len()))?;
        let longest = rows.train.iter().map(|row| row.longest()).max().unwrap_or(0);
        let base = run.base.computing(steps::compute(run));
        Ok(probe::speed(&base, method.as_ref(), steps::keep(&run.spec.training), longest.clamp(2, TIMED))?)
    })
}

fn measure(run: &Run) -> Result<RunEstimate, TrainError> {
    let rows = Rows::choose(run, &mut Silent)?;
    let plan = Plan::new(&run.spec.training, rows.train.len());
    let method = steps::method(run, &plan)?;
    let base = run.base.computing(steps::compute(run));
    let probe = Probe::measure(&base, method.as_ref())?;
    let sizes: Vec<usize> = method.variables().iter().map(|(_, variable)| variable.elem_count()).collect();
    let (drawn, hook) = (Drawn::of(run), method.hook(None)?);
    let of = |training: &Training| {
        let limit = training.max_seq_len as usize;
        let fitting = |rows: &[&Row]| -> Vec<Vec<usize>> {
            let fits = |row: &&&Row| drawn.lengths(row).iter().all(|length| *length <= limit);
            rows.iter().filter(fits).map(|row| drawn.laid(row, &base, &hook)).collect()
        };
        memory(training, run.spec.seed, &base.info, &probe, &sizes, [&fitting(&rows.train), &fitting(&rows.valid)])
    };
    let now = of(&run.spec.training);
    let others = alternatives(&run.spec.training, &run.spec.objective.path()).into_iter();
    // What the objective would refuse saves nothing.
    let others = others.filter(|(.., training)| run.spec.objective.check(training).is_ok());
    let others = others.map(|(param, value, training)| Saving { param, value, peak: of(&training).peak });
    let mut savings: Vec<Saving> = others.filter(|saving| saving.peak < now.peak).collect();
    savings.sort_by_key(|saving| saving.peak);
    let files = method.export()?;
    Ok(RunEstimate {
        rows: rows.train.len() as u64,
        left_out_rows: (run.train.len() - rows.train.len() - rows.held_out) as u64,
        tokens: rows.train.iter().map(|row| drawn.tokens(row)).sum(),
        trained_tokens: rows.train.iter().map(|row| drawn.trained(row)).sum(),
        steps: plan.total_steps,
        total_tokens: total_tokens(&plan, run.spec.seed, &rows, &drawn),
        trainable_parameters: sizes.iter().sum::<usize>() as u64,
        adapter_bytes: (files.config.len() + files.weights.len()) as u64,
        memory: MemoryEstimate { savings, ..now },
    })
}

/// What a step draws, for objectives that learn from the model's own completions: as if each were as long as it may be.
struct Drawn {
    /// Completions of each prompt, and the tokens of each; none where rows are learnt from themselves.
    texts: Option<(usize, usize)>,
    /// How often a step's texts go through the model: drawn, read under the policy and under the reference, and
    /// learnt from in each update.
    times: u64,
}

impl Drawn {
    fn of(run: &Run) -> Self {
        let objective = objectives::of(&run.spec.objective);
        let Some(online) = objective.online() else { return Self { texts: None, times: 1 } };
        let draw = online.draw();
        let read = u64::from(online.reads_policy()) + u64::from(objective.has_reference());
        let texts = (draw.num_generations as usize, draw.max_completion_length as usize);
        Self { texts: Some(texts), times: 1 + read + draw.num_iterations }
    }

    /// Of the texts that a row becomes.
    fn lengths(&self, row: &Row) -> Vec<usize> {
        match self.texts {
            Some((n, most)) => vec![row.longest() + most; n],
            None => row.examples().map(|text| text.ids.len()).collect(),
        }
    }

    /// Of the sequences that a pass reads them as: what they begin with is there once, where the method allows that.
    fn laid(&self, row: &Row, base: &Base, hook: &Arc<dyn Hook>) -> Vec<usize> {
        match self.texts {
            Some((n, most)) if Laid::is_shared(base, Some(hook)) => vec![row.longest() + n * most],
            Some(_) => self.lengths(row),
            None => Laid::of(base, Some(hook), &row.examples().collect::<Vec<_>>()).lengths().collect(),
        }
    }

    fn tokens(&self, row: &Row) -> u64 {
        self.lengths(row).iter().sum::<usize>() as u64
    }

    fn trained(&self, row: &Row) -> u64 {
        self.texts.map_or(row.trained(), |(n, most)| n * most) as u64
    }
}

/// Whole epochs, and what the last one has of its order.
fn total_tokens(plan: &Plan, seed: u64, rows: &Rows, drawn: &Drawn) -> u64 {
    let tokens = |row: &Row| drawn.times * drawn.tokens(row);
    let whole: u64 = rows.train.iter().map(|row| tokens(row)).sum();
    let (epochs, rest) = (plan.total_steps / plan.steps_per_epoch, plan.total_steps % plan.steps_per_epoch);
    let order = order::epoch(seed, epochs, rows.train.len());
    let places = (0..rest).flat_map(|step| plan.rows_of(step).1);
    epochs * whole + places.map(|place| tokens(rows.train[order[place]])).sum::<u64>()
}

/// One change each that may save memory.
fn alternatives(now: &Training, hyperparameters: &str) -> Vec<(String, Value, Training)> {
    let batch = format!("{hyperparameters}.batch_size");
    let with = |change: &dyn Fn(&mut Training)| {
        let mut training = now.clone();
        change(&mut training);
        training
    };
    let half = (now.max_seq_len / 2).max(2);
    let all = [
        (
            batch.as_str(),
            json!(1),
            with(&|t| (t.batch_size, t.grad_accumulation) = (1, t.batch_size * t.grad_accumulation)),
        ),
        ("training.gradient_checkpointing", json!(true), with(&|t| t.gradient_checkpointing = true)),
        ("training.max_seq_len", json!(half), with(&|t| t.max_seq_len = half)),
        ("training.optimizer", json!("adamw_8bit"), with(&|t| t.optimizer = Optimizer::Adamw8bit)),
    ];
    all.map(|(param, value, training)| (param.to_owned(), value, training)).into()
}

/// Nobody listens: the run itself says it again.
struct Silent;

impl Observer for Silent {
    fn step(&mut self, _: &Metrics) -> anyhow::Result<Control> {
        Ok(Control::Continue)
    }

    fn checkpoint(&mut self, _: Snapshot, _: &Metrics) -> anyhow::Result<()> {
        Ok(())
    }

    fn message(&mut self, _: &str, _: &str) -> anyhow::Result<()> {
        Ok(())
    }
}
