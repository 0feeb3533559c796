//! A stage for objectives that learn from the model's own completions: an engine, prompts, and a reward.

use std::sync::Arc;

use attune::{
    data::{Example, Prompt, Row},
    domain::{
        Completion, ObjectiveSpec, Snapshot, TrainSpec,
        rollout::{Answer, Reward, Ungraded},
    },
    inference::{Bases, EngineSettings, Handle, Resident},
    jobs::EngineRollout,
    methods::AdapterFiles,
    model::Base,
    storage::{S3Settings, open},
    text::Text,
    trainer::{Outcome, TrainError, World},
};
use serde_json::{Value, json};

use super::{
    tiny::Tiny,
    training::{From, Place, Recorder, run_in, spec},
};

/// With a grader that no run here asks.
pub fn objective(name: &str, knobs: Value) -> ObjectiveSpec {
    let grader = json!({"type": "json_valid", "name": "json", "input": "{{sample.output_text}}"});
    ObjectiveSpec::from_json(&json!({"type": name, name: {"grader": grader, "hyperparameters": knobs}})).unwrap()
}

/// An engine on a tiny base, and what draws from it.
pub struct Stage {
    pub base: Arc<Base>,
    pub rollout: EngineRollout,
    _runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

impl Stage {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Tiny::default().write(dir.path());
        let base = Base::open("tiny", dir.path()).unwrap();
        let resident = Resident { base: base.clone(), text: Arc::new(Text::open(dir.path()).unwrap()) };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let blobs = format!("file:{}", dir.path().join("blobs").display());
        let store = runtime.block_on(open(&blobs, &S3Settings::default())).unwrap();
        let bases = Bases::new([resident.clone()]);
        let engine = Handle::start(bases, store, runtime.handle().clone(), EngineSettings::default()).unwrap();
        let rollout = EngineRollout { engine, resident, project: "test".into() };
        Self { base, rollout, _runtime: runtime, _dir: dir }
    }

    pub fn task(&self, name: &str, knobs: Value, training: Value) -> TrainSpec {
        let adapter = json!({"type": "lora", "r": 3, "alpha": 7, "dropout": 0.3});
        TrainSpec { objective: objective(name, knobs), ..spec(&self.base, adapter, training) }
    }

    /// A run to its end, judged by `LikesEven`.
    pub fn finish(&self, task: &TrainSpec, rows: &[Row], resume: Option<&Snapshot>) -> (AdapterFiles, Recorder) {
        let mut recorder = Recorder::default();
        match self.run(&LikesEven, task, rows, resume, &mut recorder).unwrap() {
            Outcome::Finished { adapter, .. } => (adapter, recorder),
            other => panic!("the run ended as {other:?}"),
        }
    }

    pub fn run(
        &self,
        reward: &dyn Reward,
        task: &TrainSpec,
        rows: &[Row],
        resume: Option<&Snapshot>,
        recorder: &mut Recorder,
    ) -> Result<Outcome, TrainError> {
        let world = World { rollout: &self.rollout, reward };
        run_in(
            Place { world: Some(world), turns: None },
            &self.base,
            task,
            rows,
            From { resume, ..From::default() },
            recorder,
        )
    }
}

/// The share of even token ids.
pub fn even(completion: &Completion) -> f64 {
    completion.ids.iter().filter(|id| *id % 2 == 0).count() as f64 / completion.ids.len() as f64
}

/// Likes even token ids.
pub struct LikesEven;

impl Reward for LikesEven {
    fn rewards(&self, answers: &[Answer]) -> anyhow::Result<Vec<Result<f64, Ungraded>>> {
        Ok(answers.iter().map(|one| Ok(even(one.completion))).collect())
    }
}

pub fn prompts(n: usize) -> Vec<Row> {
    let prompt = |i: usize| {
        let ids: Vec<u32> = (0..4 + i % 3).map(|j| (40 + 7 * i + j) as u32).collect();
        let text = Example { line: i as u64 + 1, labels: vec![None; ids.len()], ids };
        Row::Prompt(Prompt { text, item: json!({"n": i}) })
    };
    (0..n).map(prompt).collect()
}

pub fn figures(recorder: &Recorder, name: &str) -> Vec<f64> {
    recorder.metrics.iter().map(|metrics| metrics.figures[name]).collect()
}
