//! The time of one optimiser step, as a job runs it: forward, cross entropy, backward, clipping and AdamW.
//!
//! ```text
//! cargo bench --bench train_step -- MODEL --batch 4 --length 128 --steps 5 --threads 2 --adapter '{"type": "dora", "r": 8}'
//! ```
//!
//! Every step has the same rows, whose ids [`ids`] makes, so that another program can repeat the losses. The first
//! step is not counted. The peak of memory is that of the training, without the loading. Prints one line of JSON.

use std::{fs, path::PathBuf, time::Instant};

use anyhow::{Context, Result};
use attune::{
    data::{Example, Row},
    domain::{
        Control, MethodSpec, Metrics, ObjectiveSpec, Observer, Snapshot, TrainSpec, Training, TrainingRequest,
        spec::{Precision, Schedule, XloraExpert},
    },
    methods::{self, AdapterFiles, Start, xlora},
    model::Base,
    trainer::{self, Run},
};
use clap::Parser;
use serde_json::json;

/// As the program has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Args {
    /// A GGUF file or a Hugging Face directory.
    model: PathBuf,
    #[arg(long, default_value_t = 4)]
    batch: usize,
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// Steps that are counted.
    #[arg(long, default_value_t = 5)]
    steps: u64,
    /// As requests have it.
    #[arg(long, default_value = r#"{"type": "lora", "r": 8, "lora_alpha": 16}"#)]
    adapter: String,
    /// What each of the adapters is that X-LoRA's gate is trained over.
    #[arg(long, default_value = r#"{"type": "lora", "r": 8, "lora_alpha": 16}"#)]
    expert: String,
    /// With `training.gradient_checkpointing`.
    #[arg(long)]
    checkpointing: bool,
    #[arg(long, default_value = "auto", value_parser = ["auto", "f32", "bf16"])]
    precision: String,
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
    let base = Base::open("bench", &args.model)?;
    let mut adapter = MethodSpec::from_json(&serde_json::from_str(&args.adapter)?)?;
    let experts = experts(&args, &base, &mut adapter)?;
    adapter.check(&base.info)?;
    adapter.fit(&base.info, args.steps + 1)?;
    let rows = rows(&args, base.info.vocab);
    let precision = match args.precision.as_str() {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        _ => Precision::Auto,
    };
    let request = TrainingRequest {
        precision: Some(precision),
        gradient_checkpointing: Some(args.checkpointing),
        n_epochs: Some(args.steps + 1),
        batch_size: Some(args.batch as u64),
        learning_rate: Some(1e-5),
        lr_scheduler: Some(Schedule::Constant),
        max_seq_len: Some(args.length as u64),
        ..TrainingRequest::default()
    };
    let training = Training::resolve(&request, &adapter, &base.info, args.batch as u64)?;
    let spec = TrainSpec {
        base: base.info.id.clone(),
        continue_from: None,
        suffix: None,
        adapter,
        objective: ObjectiveSpec::default(),
        training,
        seed: 1,
    };
    // The peak starts again from here where the kernel allows it.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let mut watch = Watch { since: Instant::now(), steps: Vec::new() };
    let run = Run {
        spec: &spec,
        base,
        train: &rows,
        valid: &[],
        resume: None,
        start: None,
        experts: &experts,
        world: None,
        turns: None,
        tokenize: &|_| Ok(Vec::new()),
    };
    trainer::train(run, &mut watch)?;

    let (first, counted) = watch.steps.split_first().context("no step was run")?;
    let mut times: Vec<f64> = counted.iter().map(|step| step.milliseconds).collect();
    times.sort_by(f64::total_cmp);
    let median = *times.get(times.len() / 2).context("no step was counted")?;
    let found = json!({
        "tokens_per_second": (args.batch * args.length) as f64 / median * 1000.0,
        "step_ms": median,
        "first_loss": first.loss,
        "loss": counted.last().and_then(|step| step.loss),
        "peak_rss_mb": peak_rss_mb()?,
        "threads": rayon::current_num_threads(),
    });
    println!("{found}");
    Ok(())
}

/// Fresh adapters in the place of those that X-LoRA's spec names.
fn experts(args: &Args, base: &Base, adapter: &mut MethodSpec) -> Result<Vec<AdapterFiles>> {
    let MethodSpec::Xlora(spec) = adapter else { return Ok(Vec::new()) };
    let expert = MethodSpec::from_json(&serde_json::from_str(&args.expert)?)?;
    expert.check(&base.info)?;
    let mut found = Vec::new();
    for (name, seed) in spec.adapters.iter().zip(1..) {
        let start = Start { base, seed, total_steps: 1, experts: &[], tokenize: &|_| Ok(Vec::new()) };
        let files = methods::create(&expert, &start)?.export()?;
        let (lora, _) = xlora::expert(&files, &base.info)?;
        spec.experts.push(XloraExpert { generation: Some(name.clone()), lora });
        found.push(files);
    }
    Ok(found)
}

/// One batch; the whole of each row is trained on.
fn rows(args: &Args, vocab: usize) -> Vec<Row> {
    let mut ids = ids(vocab);
    (1..=args.batch as u64)
        .map(|line| {
            let ids: Vec<u32> = ids.by_ref().take(args.length).collect();
            Row::Example(Example { line, labels: ids.iter().copied().map(Some).collect(), ids })
        })
        .collect()
}

/// Knuth's linear congruential generator, its upper bits modulo the vocabulary.
fn ids(vocab: usize) -> impl Iterator<Item = u32> {
    let mut state = 1u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab as u64) as u32
    })
}

struct Step {
    milliseconds: f64,
    loss: Option<f64>,
}

/// Times steps from the end of one checkpoint to the end of the step after it.
struct Watch {
    since: Instant,
    steps: Vec<Step>,
}

impl Observer for Watch {
    fn step(&mut self, metrics: &Metrics) -> Result<Control> {
        let milliseconds = self.since.elapsed().as_secs_f64() * 1000.0;
        self.steps.push(Step { milliseconds, loss: metrics.train_loss });
        self.since = Instant::now();
        Ok(Control::Continue)
    }

    fn checkpoint(&mut self, snapshot: Snapshot, _: &Metrics) -> Result<()> {
        drop(snapshot);
        self.since = Instant::now();
        Ok(())
    }

    fn message(&mut self, level: &str, text: &str) -> Result<()> {
        eprintln!("{level}: {text}");
        Ok(())
    }
}

fn peak_rss_mb() -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in /proc/self/status")?;
    let kilobytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes / 1024.0)
}
