//! The engine without HTTP: tiny bases, adapters of random weights, a store that counts.

mod batching;
mod canary;
mod chaos;
mod embedding;
mod fairness;
mod faults;
mod grammar;
mod live;
mod mix;
mod pages;
mod prefixes;
mod room;
mod slots;
mod whole;

use std::sync::Arc;

use attune::{
    domain::MethodSpec,
    inference::{
        AdapterRef, Bases, EngineError, EngineSettings, Finish, Handle, Output, Request, Resident, Sampling, Status,
        Task, TokenLogprob,
    },
    jobs::publish_adapter,
    methods::{self, AdapterFiles},
    model::{Base, Compute},
    storage::{BlobStore, S3Settings, open},
    text::Text,
};
use candle_core::{Device, Tensor, quantized::GgmlDType};
use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;

use crate::support::{
    faulty::{self, Latch},
    quantised,
    store::Watched,
    tiny::{Random, Tiny, VOCAB},
    training::create,
};

/// An engine on four bases: `dense`, `other` (other weights), `quantised`, and `fast`: the same with int8 products.
struct Bench {
    bases: Bases,
    store: Arc<Watched>,
    engine: Handle,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn start(settings: EngineSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (dense, other, gguf) = (dir.path().join("dense"), dir.path().join("other"), dir.path().join("tiny.gguf"));
        Tiny::default().write(&dense);
        Tiny { seed: 2, ..Tiny::default() }.write(&other);
        quantised::write(&Tiny::default(), &gguf, GgmlDType::Q4_1);
        let text = Arc::new(Text::open(&dense).unwrap());
        let bases = [
            ("dense", &dense, Compute::F32),
            ("other", &other, Compute::F32),
            ("quantised", &gguf, Compute::F32),
            ("fast", &gguf, Compute::Int8),
        ]
        .map(|(id, path, compute)| {
            let base = Base::open(id, path).unwrap().computing(compute);
            Resident { base, text: text.clone() }
        });
        let bases = Bases::new(bases);
        let blobs = format!("file:{}", dir.path().join("blobs").display());
        let store = Arc::new(Watched::new(open(&blobs, &S3Settings::default()).await.unwrap()));
        let bench = |engine| Self { bases: bases.clone(), store: store.clone(), engine, _dir: dir };
        bench(engine(&bases, &store, settings))
    }

    /// Another engine on the same bases and adapters.
    fn engine(&self, settings: EngineSettings) -> Handle {
        engine(&self.bases, &self.store, settings)
    }

    fn base(&self, id: &str) -> &Base {
        &self.bases.get(id).unwrap().base
    }

    async fn publish(&self, base: &str, files: &AdapterFiles) -> AdapterRef {
        let store: Arc<dyn BlobStore> = self.store.clone();
        let manifest = publish_adapter(&store, files, &self.base(base).info, "lora").await.unwrap();
        let bytes = manifest.files.iter().map(|file| file.bytes).sum();
        // The faulty ones have no spec.
        let virtual_tokens = methods::spec_of(files).map_or(0, |spec| spec.virtual_tokens());
        AdapterRef { generation: manifest.generation, bytes, virtual_tokens }
    }

    /// An adapter with random values of about this size in every trained tensor.
    async fn adapter_of_size(&self, base: &str, spec: Value, seed: u64, size: f32) -> AdapterRef {
        let method = create(&MethodSpec::from_json(&spec).unwrap(), self.base(base), seed);
        let mut random = Random(seed);
        for (_, variable) in method.variables() {
            let values: Vec<f32> = (0..variable.elem_count()).map(|_| size * random.normal()).collect();
            variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap()).unwrap();
        }
        self.publish(base, &method.export().unwrap()).await
    }

    async fn adapter(&self, base: &str, spec: Value, seed: u64) -> AdapterRef {
        self.adapter_of_size(base, spec, seed, 0.2).await
    }

    /// Some adapters of the same size on the dense base.
    async fn several(&self, n: u64) -> Vec<AdapterRef> {
        let mut all = Vec::new();
        for seed in 0..n {
            all.push(self.adapter("dense", json!({"type": "lora", "r": 4, "alpha": 6}), 10 + seed).await);
        }
        all
    }

    /// An adapter of `support::faulty`.
    async fn fault(&self, what: &str) -> AdapterRef {
        let files = AdapterFiles { config: what.as_bytes().to_vec(), weights: vec![1; 64] };
        self.publish("dense", &files).await
    }

    /// Keeps the engine inside a step until the latch is opened. `name` is the test's own.
    async fn hold(&self, name: &str) -> (Arc<Latch>, Receiver<Output>) {
        let adapter = self.fault(&format!("holds {name}")).await;
        self.hold_with(&adapter, name).await
    }

    /// The same with the fault that is published already.
    async fn hold_with(&self, adapter: &AdapterRef, name: &str) -> (Arc<Latch>, Receiver<Output>) {
        let latch = Latch::named(&format!("holds {name}"));
        let receiver = self.engine.submit(ask(Some(adapter), 3, 1)).unwrap();
        latch.reached().await;
        (latch, receiver)
    }

    /// Waits until the engine has this in hand.
    async fn until(&self, what: impl Fn(Status) -> bool) {
        while !what(self.engine.status()) {
            tokio::task::yield_now().await;
        }
    }
}

fn engine(bases: &Bases, store: &Arc<Watched>, settings: EngineSettings) -> Handle {
    let runtime = tokio::runtime::Handle::current();
    Handle::start(bases.clone(), store.clone(), runtime, settings).unwrap()
}

fn settings() -> EngineSettings {
    EngineSettings { loader: faulty::load, ..EngineSettings::default() }
}

/// `prompt` random tokens on the dense base, then this many greedy ones with their log-probabilities.
fn ask(adapter: Option<&AdapterRef>, prompt: usize, max_tokens: usize) -> Request {
    let mut random = Random(prompt as u64);
    Request {
        base: "dense".to_owned(),
        adapter: adapter.cloned(),
        project: "default".to_owned(),
        prompt: (0..prompt).map(|_| random.below(VOCAB) as u32).collect(),
        max_tokens,
        sampling: Sampling { temperature: 0.0, ignore_eos: true, ..Sampling::default() },
        stop_ids: vec![258],
        logprobs: Some(3),
        prompt_logprobs: None,
        task: Task::Complete,
        grammar: None,
        is_background: false,
        deadline: None,
    }
}

/// All that came back.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    prompt: Vec<Option<TokenLogprob>>,
    tokens: Vec<(u32, Option<TokenLogprob>)>,
    end: Option<Result<Finish, EngineError>>,
}

impl Answer {
    fn take(&mut self, output: Output) {
        assert!(self.end.is_none(), "{output:?} behind the end");
        match output {
            // Where something was read before is for `prefixes` to say.
            Output::Reused(_) => {}
            Output::Prompt(found) => {
                assert!(self.prompt.is_empty() && self.tokens.is_empty());
                self.prompt = found;
            }
            Output::Token { id, logprob } => self.tokens.push((id, logprob)),
            Output::Scores { .. } => panic!("scores that nobody asked for"),
            Output::Embedding(_) => panic!("an embedding that nobody asked for"),
            Output::Done(finish) => self.end = Some(Ok(finish)),
            Output::Failed(error) => self.end = Some(Err(error)),
        }
    }

    #[track_caller]
    fn ok(self) -> Self {
        assert!(matches!(self.end, Some(Ok(_))), "{:?}", self.end);
        self
    }

    #[track_caller]
    fn error(&self) -> EngineError {
        match &self.end {
            Some(Err(error)) => error.clone(),
            other => panic!("no error but {other:?}"),
        }
    }
}

/// Everything to the end, which every answer must have.
async fn collect(mut receiver: Receiver<Output>) -> Answer {
    let mut answer = Answer::default();
    while let Some(output) = receiver.recv().await {
        answer.take(output);
    }
    assert!(answer.end.is_some(), "no end: {answer:?}");
    answer
}

/// What is there already.
fn so_far(receiver: &mut Receiver<Output>) -> Answer {
    let mut answer = Answer::default();
    while let Ok(output) = receiver.try_recv() {
        answer.take(output);
    }
    answer
}

async fn run(engine: &Handle, request: Request) -> Answer {
    collect(engine.submit(request).unwrap()).await
}
