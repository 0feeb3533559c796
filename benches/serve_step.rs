//! Tokens per second of the serving engine: a prompt of 512, and decoding in batches of several sizes, on the base and
//! with as many adapters as sequences.
//!
//! ```text
//! ATTUNE_CPU_KERNELS=avx2 cargo bench --bench serve_step -- MODEL --batches 1,8,32 --rank 16 --threads 2
//! ```
//!
//! Decoding counts from the moment when every sequence has its first token to that when one has its last. Prints one
//! line of JSON for each figure, and first how often the int8 products choose the token that f32 ones choose.

use std::{path::PathBuf, sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use attune::{
    domain::MethodSpec,
    inference::{AdapterRef, Bases, EngineSettings, Handle, Output, Request, Resident, Sampling, Task},
    jobs::publish_adapter,
    methods::{self, Start},
    model::{Base, Batch, Compute, Sequence, kernels::Isa},
    storage::{BlobStore, S3Settings, open},
    text::Text,
};
use candle_core::Tensor;
use clap::Parser;
use serde_json::json;

/// As the program has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Args {
    /// A GGUF file or a Hugging Face directory.
    model: PathBuf,
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    batches: Vec<usize>,
    /// Tokens that each sequence makes.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Of the adapters, on all linears.
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// f32 products instead of int8 ones.
    #[arg(long)]
    exact: bool,
    /// Kernels to use instead of the best.
    #[arg(long, env = "ATTUNE_CPU_KERNELS")]
    cpu_kernels: Option<String>,
    /// 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Cargo adds it.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    // SAFETY: no other thread has started yet.
    unsafe { attune::process::prepare() };
    let args = Args::parse();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    if let Some(name) = &args.cpu_kernels {
        Isa::force(name).map_err(anyhow::Error::msg)?;
    }
    tokio::runtime::Runtime::new()?.block_on(run(&args))
}

async fn run(args: &Args) -> Result<()> {
    let dense = Base::open("bench", &args.model)?;
    let fast = dense.computing(Compute::Int8);
    agreement(&dense, &fast)?;
    let base = if args.exact { dense } else { fast };
    let dir = tempfile::tempdir()?;
    let blobs = format!("file:{}", dir.path().display());
    let store: Arc<dyn BlobStore> = open(&blobs, &S3Settings::default()).await?;
    let text = Arc::new(Text::open(&args.model)?);
    let bases = Bases::new([Resident { base: base.clone(), text }]);
    let most = args.batches.iter().copied().max().context("no batch")?;
    let settings = EngineSettings { max_batch: most, adapter_budget_bytes: 64 << 30, ..EngineSettings::default() };
    let engine = Handle::start(bases, store.clone(), tokio::runtime::Handle::current(), settings)?;

    // Once before it counts.
    decode(&engine, vec![request(args.prompt, 1, None, 0)]).await?;
    let since = Instant::now();
    decode(&engine, vec![request(args.prompt, 1, None, 1)]).await?;
    print(args, "prompt", args.prompt, args.prompt as f64 / since.elapsed().as_secs_f64());

    let mut adapters = Vec::new();
    for seed in 0..most as u64 {
        adapters.push(adapter(&base, &store, args.rank, seed).await?);
    }
    for n in args.batches.iter().copied() {
        let plain = (0..n).map(|i| request(8, args.tokens, None, i));
        print(args, "base", n, decode(&engine, plain.collect()).await?);
        let own = |tokens: usize| (0..n).map(|i| request(8, tokens, Some(&adapters[i]), i)).collect();
        // Loaded before it counts.
        decode(&engine, own(2)).await?;
        print(args, "adapters", n, decode(&engine, own(args.tokens)).await?);
    }
    engine.stop(std::time::Duration::ZERO).await;
    Ok(())
}

fn print(args: &Args, what: &str, batch: usize, tokens_per_second: f64) {
    let (kernels, threads) = (Isa::chosen().name(), rayon::current_num_threads());
    let line = json!({"what": what, "batch": batch, "tokens_per_second": tokens_per_second.round(), "kernels": kernels,
        "exact": args.exact, "threads": threads});
    println!("{line}");
}

/// Of 256 positions of one text, how often both have the same likeliest token, and the largest difference of
/// log-probabilities at it.
fn agreement(exact: &Base, fast: &Base) -> Result<()> {
    let ids: Vec<u32> = ids(exact.info.vocab, 256, 7);
    let scores = |base: &Base| -> Result<Vec<Vec<f32>>> {
        let sequences = vec![Sequence { tokens: &ids, branches: &[], hook: None, cache: None }];
        let hidden = base.forward(&mut Batch { sequences, train: None })?;
        Ok(base.logits(&hidden, None)?.to_vec2()?)
    };
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(id, _)| id);
    let logprob = |row: &[f32], id: usize| {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        f64::from(row[id]) - sum.ln()
    };
    let (exact, fast) = (scores(exact)?, scores(fast)?);
    let (mut same, mut most) = (0, 0f64);
    for (a, b) in exact.iter().zip(&fast) {
        let id = best(a);
        same += usize::from(id == best(b));
        most = most.max((logprob(a, id) - logprob(b, id)).abs());
    }
    println!("{}", json!({"what": "agreement", "same_argmax": same, "of": exact.len(), "largest_logprob_error": most}));
    Ok(())
}

/// Knuth's linear congruential generator, its upper bits modulo the vocabulary.
fn ids(vocab: usize, n: usize, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab as u64) as u32
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn request(prompt: usize, max_tokens: usize, adapter: Option<&AdapterRef>, seed: usize) -> Request {
    Request {
        base: "bench".to_owned(),
        adapter: adapter.cloned(),
        project: "bench".to_owned(),
        prompt: ids(1000, prompt, seed as u64),
        max_tokens,
        sampling: Sampling { temperature: 0.0, ignore_eos: true, ..Sampling::default() },
        stop_ids: Vec::new(),
        logprobs: None,
        prompt_logprobs: None,
        grammar: None,
        task: Task::Complete,
        is_background: false,
        deadline: None,
    }
}

/// A LoRA adapter whose B is not zero.
async fn adapter(base: &Arc<Base>, store: &Arc<dyn BlobStore>, rank: usize, seed: u64) -> Result<AdapterRef> {
    let spec = MethodSpec::from_json(&json!({"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}))?;
    let start = Start { base, seed, total_steps: 1, experts: &[], tokenize: &|_| Ok(Vec::new()) };
    let method = methods::create(&spec, &start)?;
    for (_, variable) in method.variables().iter().filter(|(name, _)| name.contains("lora_B")) {
        variable.set(&Tensor::full(1e-3f32 * (seed + 1) as f32, variable.shape(), variable.device())?)?;
    }
    let manifest = publish_adapter(store, &method.export()?, &base.info, "lora").await?;
    let bytes = manifest.files.iter().map(|file| file.bytes).sum();
    Ok(AdapterRef { generation: manifest.generation, bytes, virtual_tokens: 0 })
}

/// Tokens per second while all requests decode.
async fn decode(engine: &Handle, requests: Vec<Request>) -> Result<f64> {
    let tasks = requests.into_iter().map(|request| {
        let mut receiver = engine.submit(request)?;
        Ok(tokio::spawn(async move {
            let mut times = Vec::new();
            while let Some(output) = receiver.recv().await {
                match output {
                    Output::Token { .. } => times.push(Instant::now()),
                    Output::Failed(error) => return Err(anyhow::Error::new(error)),
                    _ => {}
                }
            }
            Ok(times)
        }))
    });
    let mut all = Vec::new();
    for task in tasks.collect::<Result<Vec<_>>>()? {
        all.push(task.await??);
    }
    let first = all.iter().filter_map(|times| times.first()).max().context("no tokens")?;
    let last = all.iter().filter_map(|times| times.last()).min().context("no tokens")?;
    let counted = all.iter().flatten().filter(|time| *time > first && *time <= last).count();
    ensure!(all.iter().all(|times| !times.is_empty()), "a request without a token");
    Ok(counted as f64 / (*last - *first).as_secs_f64())
}
