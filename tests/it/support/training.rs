//! Short training runs: specs, rows and an observer that remembers.

use std::sync::Arc;

use attune::{
    data::{Example, Row},
    domain::{Control, MethodSpec, Metrics, ObjectiveSpec, Observer, Snapshot, TrainSpec, Training, TrainingRequest},
    methods::{self, AdapterFiles, MethodError, Start, Trainable},
    model::{Base, Turns},
    trainer::{Outcome, Run, TrainError, World, train},
};
use serde_json::Value;

use super::tiny::{Random, VOCAB};

/// `training` is the request's object; seed 5.
pub fn spec(base: &Base, adapter: Value, training: Value) -> TrainSpec {
    let adapter = MethodSpec::from_json(&adapter).unwrap();
    adapter.check(&base.info).unwrap();
    let request = TrainingRequest::from_json(&training, &Default::default()).unwrap();
    let training = Training::resolve(&request, &adapter, &base.info, 1).unwrap();
    TrainSpec {
        base: base.info.id.clone(),
        continue_from: None,
        suffix: None,
        adapter,
        objective: ObjectiveSpec::default(),
        training,
        seed: 5,
    }
}

/// Rows of these lengths; the first two tokens of each are only read.
pub fn rows(lengths: &[usize], seed: u64) -> Vec<Example> {
    let mut random = Random(seed);
    lengths
        .iter()
        .zip(1..)
        .map(|(length, line)| {
            let ids: Vec<u32> = (0..*length).map(|_| random.below(VOCAB) as u32).collect();
            let labels = ids.iter().enumerate().map(|(i, id)| (i >= 2).then_some(*id)).collect();
            Example { line, ids, labels }
        })
        .collect()
}

/// Remembers everything; answers `control` after a step.
#[derive(Default)]
pub struct Recorder {
    pub metrics: Vec<Metrics>,
    pub snapshots: Vec<Snapshot>,
    pub messages: Vec<String>,
    pub control: Option<(u64, Control)>,
}

impl Recorder {
    pub fn losses(&self) -> Vec<f64> {
        self.metrics.iter().map(|metrics| metrics.train_loss.unwrap()).collect()
    }

    pub fn norms(&self) -> Vec<f64> {
        self.metrics.iter().map(|metrics| metrics.grad_norm.unwrap()).collect()
    }
}

impl Observer for Recorder {
    fn step(&mut self, metrics: &Metrics) -> anyhow::Result<Control> {
        self.metrics.push(metrics.clone());
        Ok(self.control.filter(|(step, _)| *step == metrics.step).map_or(Control::Continue, |(_, control)| control))
    }

    fn checkpoint(&mut self, snapshot: Snapshot, _: &Metrics) -> anyhow::Result<()> {
        self.snapshots.push(snapshot);
        Ok(())
    }

    fn message(&mut self, _: &str, text: &str) -> anyhow::Result<()> {
        self.messages.push(text.to_owned());
        Ok(())
    }
}

/// The tiny models' tokenizer.
fn bytes(text: &str) -> Result<Vec<u32>, MethodError> {
    Ok(text.bytes().map(u32::from).collect())
}

/// A fresh adapter of a run of 20 steps.
pub fn create(spec: &MethodSpec, base: &Base, seed: u64) -> Box<dyn Trainable> {
    methods::create(spec, &Start { base, seed, total_steps: 20, tokenize: &bytes }).unwrap()
}

/// Where a run begins.
#[derive(Clone, Copy, Default)]
pub struct From<'a> {
    pub resume: Option<&'a Snapshot>,
    pub start: Option<&'a AdapterFiles>,
}

pub fn run<R: Into<Row> + Clone>(
    base: &Arc<Base>,
    spec: &TrainSpec,
    rows: &[R],
    from: From,
    recorder: &mut Recorder,
) -> Result<Outcome, TrainError> {
    run_in(Place::default(), base, spec, rows, from, recorder)
}

/// What stands around a run.
#[derive(Default)]
pub struct Place<'a> {
    /// Where completions can be drawn.
    pub world: Option<World<'a>>,
    /// With whom it shares the machine.
    pub turns: Option<Arc<Turns>>,
}

/// The same in a place of its own, watched by any observer.
pub fn run_in<R: Into<Row> + Clone>(
    Place { world, turns }: Place,
    base: &Arc<Base>,
    spec: &TrainSpec,
    rows: &[R],
    from: From,
    observer: &mut dyn Observer,
) -> Result<Outcome, TrainError> {
    let rows: Vec<Row> = rows.iter().cloned().map(Into::into).collect();
    let run = Run {
        spec,
        base: base.clone(),
        train: &rows,
        valid: &[],
        resume: from.resume,
        start: from.start,
        world,
        turns,
        tokenize: &bytes,
    };
    train(run, observer)
}

/// A run to its end.
pub fn finish<R: Into<Row> + Clone>(
    base: &Arc<Base>,
    spec: &TrainSpec,
    rows: &[R],
    from: From,
) -> (AdapterFiles, Recorder) {
    let mut recorder = Recorder::default();
    match run(base, spec, rows, from, &mut recorder).unwrap() {
        Outcome::Finished { adapter, .. } => (adapter, recorder),
        other => panic!("the run ended as {other:?}"),
    }
}
