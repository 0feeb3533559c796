//! Training beside serving: who gives way to whom, and adapters that are served while they are trained.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use attune::{
    domain::{Control, Live, Metrics, Observer, Snapshot, TrainSpec},
    inference::{Handle, InMemory, LiveRun, Output, Request, adapter_of},
    model::Base,
    trainer::Outcome,
};
use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;

use super::{Answer, Bench, ask, collect, run, settings};
use crate::support::training::{From, Place, rows, run_in, spec};

/// Trains in a thread of its own with the engine's turns, watched.
fn train(
    bench: &Bench,
    adapter: Value,
    training: Value,
    lengths: &[usize],
    mut watch: Watch,
) -> std::thread::JoinHandle<Watch> {
    let base: Arc<Base> = bench.bases.get("dense").unwrap().base.clone();
    let (turns, spec): (_, TrainSpec) = (bench.engine.turns().clone(), spec(&base, adapter, training));
    let rows = rows(lengths, 3);
    std::thread::spawn(move || {
        let place = Place { world: None, turns: Some(turns) };
        let outcome = run_in(place, &base, &spec, &rows, From::default(), &mut watch).unwrap();
        assert!(matches!(outcome, Outcome::Finished { .. }));
        watch
    })
}

/// What happens at a step.
type AtStep = Box<dyn FnMut(u64) + Send>;

struct Watch {
    steps: Arc<AtomicU64>,
    begun: Box<dyn FnMut(Arc<dyn Live>) + Send>,
    at: AtStep,
    snapshots: Vec<Snapshot>,
}

impl Default for Watch {
    fn default() -> Self {
        Self { steps: Arc::default(), begun: Box::new(|_| {}), at: Box::new(|_| {}), snapshots: Vec::new() }
    }
}

impl Observer for Watch {
    fn begun(&mut self, live: Arc<dyn Live>) -> anyhow::Result<()> {
        (self.begun)(live);
        Ok(())
    }

    fn step(&mut self, metrics: &Metrics) -> anyhow::Result<Control> {
        self.steps.store(metrics.step, SeqCst);
        (self.at)(metrics.step);
        Ok(Control::Continue)
    }

    fn checkpoint(&mut self, snapshot: Snapshot, _: &Metrics) -> anyhow::Result<()> {
        self.snapshots.push(snapshot);
        Ok(())
    }

    fn message(&mut self, _: &str, _: &str) -> anyhow::Result<()> {
        Ok(())
    }
}

async fn until_training_waits(bench: &Bench) {
    while bench.engine.turns().waiting() == 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_stream_while_a_training_step_runs() {
    let bench = Bench::start(settings()).await;
    let (latch, held) = bench.hold("training").await;
    let steps = Arc::new(AtomicU64::new(0));
    let watch = Watch { steps: steps.clone(), ..Watch::default() };
    let training = json!({"n_epochs": 1, "batch_size": 16, "max_seq_len": 400});
    let trained = train(&bench, json!({"r": 4, "alpha": 6}), training, &[390; 16], watch);
    // It has begun its step and stands still, since the engine is inside one of its own.
    until_training_waits(&bench).await;
    assert_eq!(steps.load(SeqCst), 0);
    let receivers: Vec<_> = (0..3).map(|i| bench.engine.submit(ask(None, 4 + i, 25)).unwrap()).collect();
    latch.open();
    for receiver in receivers {
        assert_eq!(collect(receiver).await.ok().tokens.len(), 25);
    }
    assert_eq!(steps.load(SeqCst), 0, "the step was over before 25 tokens had come");
    collect(held).await.ok();
    tokio::task::spawn_blocking(move || trained.join().unwrap()).await.unwrap();
    assert_eq!(steps.load(SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_engine_does_not_starve_training() {
    let bench = Bench::start(settings()).await;
    let (latch, held) = bench.hold("starving").await;
    let ended = Arc::new(AtomicBool::new(false));
    let trained = train(
        &bench,
        json!({"r": 2, "alpha": 5}),
        json!({"n_epochs": 3, "batch_size": 2, "max_seq_len": 64}),
        &[9, 30, 21, 12],
        Watch::default(),
    );
    until_training_waits(&bench).await;
    // Two at a time: while one ends, the other keeps the engine at work.
    let loops: Vec<_> = (0..2)
        .map(|i| {
            let (engine, ended) = (bench.engine.clone(), ended.clone());
            tokio::spawn(async move {
                while !ended.load(SeqCst) {
                    run(&engine, ask(None, 5 + i, 200 + 31 * i)).await.ok();
                }
            })
        })
        .collect();
    latch.open();
    let watch = tokio::task::spawn_blocking(move || trained.join().unwrap()).await.unwrap();
    assert_eq!(watch.steps.load(SeqCst), 6);
    ended.store(true, SeqCst);
    for one in loops {
        one.await.unwrap();
    }
    collect(held).await.ok();
}

/// A request for an adapter that is in memory.
fn submit(engine: &Handle, made: &InMemory, max_tokens: usize) -> Receiver<Output> {
    let request = Request { adapter: Some(made.adapter.clone()), ..ask(None, 41, max_tokens) };
    engine.submit_with(request, made.lease.clone()).unwrap()
}

/// For a method that lives in linears, one that lives in the cache, and one that changes itself after its steps.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_adapter_is_the_one_that_its_step_exports() {
    let bench = Bench::start(settings()).await;
    for adapter in [
        json!({"r": 4, "alpha": 30}),
        json!({"type": "prefix_tuning", "num_virtual_tokens": 5}),
        json!({"type": "adalora", "init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1}),
    ] {
        let (engine, runtime) = (bench.engine.clone(), tokio::runtime::Handle::current());
        let resident = bench.bases.get("dense").unwrap().clone();
        let (shown, answers) =
            (Arc::new(std::sync::Mutex::new(None)), Arc::new(std::sync::Mutex::new(BTreeMap::new())));
        let begun = {
            let (shown, lives) = (shown.clone(), engine.lives().clone());
            move |live: Arc<dyn Live>| {
                let run = LiveRun::new("ftjob-1", "some", &resident, live);
                *shown.lock().unwrap() = Some(lives.show("p", &["ftjob-1", "ft:x"], run));
            }
        };
        let at = {
            let (answers, engine) = (answers.clone(), engine.clone());
            move |step: u64| {
                let (now, made) = engine.lives().get("p", "ft:x").unwrap().current().unwrap();
                assert_eq!(now, step);
                let mut receiver = submit(&engine, &made, 40);
                let first = receiver.blocking_recv().unwrap();
                // The rest comes while later steps are made.
                let rest = runtime.spawn(async move {
                    let mut answer = Answer::default();
                    answer.take(first);
                    while let Some(output) = receiver.recv().await {
                        answer.take(output);
                    }
                    answer
                });
                answers.lock().unwrap().insert(step, (made.adapter, rest));
            }
        };
        let training =
            json!({"n_epochs": 2, "batch_size": 1, "checkpoint_every": 1, "learning_rate": 0.3, "max_seq_len": 64});
        let watch = Watch { begun: Box::new(begun), at: Box::new(at), ..Watch::default() };
        let trained = train(&bench, adapter.clone(), training, &[14, 9, 17], watch);
        // Others look at any moment; they must see whole steps.
        let mut seen = Vec::new();
        while !trained.is_finished() {
            if let Some(run) = engine.lives().get("p", "ftjob-1") {
                let (step, made) = tokio::task::spawn_blocking(move || run.current().unwrap()).await.unwrap();
                seen.push((step, made.adapter.generation));
            }
        }
        let watch = tokio::task::spawn_blocking(move || trained.join().unwrap()).await.unwrap();
        let mut generations = Vec::new();
        for snapshot in &watch.snapshots {
            let published = bench.publish("dense", &adapter_of(snapshot).unwrap()).await;
            assert!(!generations.contains(&published.generation), "{adapter}: a step changed nothing");
            generations.push(published.generation.clone());
            let Some((live, answer)) = answers.lock().unwrap().remove(&snapshot.step) else { continue };
            assert_eq!(live, published, "{adapter}");
            let fresh = bench.engine(settings());
            let stored = run(&fresh, ask(Some(&published), 41, 40)).await.ok();
            assert_eq!(answer.await.unwrap(), stored, "{adapter} at step {}", snapshot.step);
        }
        assert_eq!(generations.len(), 7);
        assert!(answers.lock().unwrap().is_empty());
        for (step, generation) in seen {
            assert_eq!(generation, generations[step as usize], "{adapter}: seen within step {step}");
        }
        drop(shown.lock().unwrap().take());
        assert!(engine.lives().get("p", "ft:x").is_none() && engine.lives().get("p", "ftjob-1").is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_just_made_is_served_without_the_store() {
    let bench = Bench::start(settings()).await;
    let method = crate::support::training::create(
        &attune::domain::MethodSpec::from_json(&json!({"r": 3, "alpha": 4})).unwrap(),
        bench.base("dense"),
        4,
    );
    let files = method.export().unwrap();
    let published = bench.publish("dense", &files).await;
    let reads = bench.store.reads_of(&published.generation);
    let resident = bench.bases.get("dense").unwrap();
    bench.engine.keep(resident, &published, &files);
    run(&bench.engine, ask(Some(&published), 4, 4)).await.ok();
    assert_eq!(bench.store.reads_of(&published.generation), reads);
    // Not where it would push others out.
    let narrow = attune::inference::EngineSettings { adapter_budget_bytes: published.bytes - 1, ..settings() };
    let engine = bench.engine(narrow);
    engine.keep(resident, &published, &files);
    assert_eq!(engine.status().adapters, 0);
}
