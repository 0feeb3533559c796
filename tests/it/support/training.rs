//! Short training runs: specs, rows and an observer that remembers.

use std::sync::Arc;

use attune::{
    data::{Example, Row},
    domain::{
        Control, MethodSpec, Metrics, ObjectiveSpec, Observer, Snapshot, TrainSpec, Training, TrainingRequest,
        spec::XloraExpert,
    },
    methods::{self, AdapterFiles, MethodError, Start, Trainable, xlora},
    model::{Base, Hook, Sequence, SequenceCache, Turns},
    trainer::{Outcome, Run, TrainError, World, train},
};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::tiny::{Random, VOCAB};

/// `training` is the request's object; seed 5.
pub fn spec(base: &Base, adapter: Value, training: Value) -> TrainSpec {
    let adapter = method(base, &adapter);
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

/// A request's method, with what a server finds out about the adapters that it names.
pub fn method(base: &Base, adapter: &Value) -> MethodSpec {
    let mut method = MethodSpec::from_json(adapter).unwrap();
    let files = experts(base, &method);
    if let MethodSpec::Xlora(spec) = &mut method {
        let lora = |files| xlora::expert(files, &base.info).unwrap().0;
        spec.experts = files.iter().map(|files| XloraExpert { generation: None, lora: lora(files) }).collect();
    }
    method
}

/// The adapters that a method names: random ones, of different ranks, scales and targets.
fn experts(base: &Base, method: &MethodSpec) -> Vec<AdapterFiles> {
    let MethodSpec::Xlora(spec) = method else { return Vec::new() };
    let targets =
        [["q_proj", "v_proj", "down_proj"], ["k_proj", "v_proj", "up_proj"], ["o_proj", "v_proj", "gate_proj"]];
    let expert = |i: usize| {
        let knobs = json!({"r": 2 + i, "alpha": 5, "dropout": 0.1, "target_modules": targets[i % 3]});
        let lora = create(&MethodSpec::from_json(&knobs).unwrap(), base, i as u64);
        let mut random = Random(40 + i as u64);
        for (_, variable) in lora.variables() {
            let values: Vec<f32> = (0..variable.elem_count()).map(|_| 0.2 * random.normal()).collect();
            variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap()).unwrap();
        }
        lora.export().unwrap()
    };
    (0..spec.adapters.len()).map(expert).collect()
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
    let experts = experts(base, spec);
    methods::create(spec, &Start { base, seed, total_steps: 20, experts: &experts, tokenize: &bytes }).unwrap()
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
    let experts = experts(base, &spec.adapter);
    let run = Run {
        experts: &experts,
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

pub fn sequence<'a>(
    tokens: &'a [u32],
    hook: Option<&Arc<dyn Hook>>,
    cache: Option<&'a mut SequenceCache>,
) -> Sequence<'a> {
    Sequence { tokens, branches: &[], hook: hook.cloned(), cache }
}

/// Whether rows differ by at most so much, relative to numbers above 1.
pub fn are_near(rows: &[Vec<f32>], others: &[Vec<f32>], limit: f32) -> bool {
    let pairs = rows.iter().flatten().zip(others.iter().flatten());
    rows.len() == others.len() && pairs.into_iter().all(|(a, b)| (a - b).abs() <= limit * a.abs().max(1.0))
}
