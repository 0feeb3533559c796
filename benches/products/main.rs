//! The time of single products, as a training step has them: a linear of the frozen base and its gradient for the rows,
//! and a low-rank change with all of its gradients.
//!
//! ```text
//! cargo bench --bench products -- MODEL --rows 512 --ranks 8,16,64 --threads 2
//! ```
//!
//! Prints one JSON object: milliseconds by the name of the product, medians of the repetitions.

use std::{hint::black_box, path::PathBuf, time::Instant};

use anyhow::{Context, Result};
use attune::{
    domain::Site,
    model::{Base, Compute, ops},
};
use candle_core::{Device, Tensor, Var};
use clap::Parser;
use serde_json::{Map, Value, json};

/// As the program has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Args {
    /// A GGUF file or a Hugging Face directory.
    model: PathBuf,
    #[arg(long, default_value_t = 512)]
    rows: usize,
    #[arg(long, value_delimiter = ',', default_value = "8,16,64")]
    ranks: Vec<usize>,
    #[arg(long, default_value_t = 20)]
    repetitions: usize,
    #[arg(long, default_value = "auto", value_parser = ["auto", "f32", "bf16"])]
    precision: String,
    /// 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Cargo adds it.
    #[arg(long, hide = true)]
    bench: bool,
}

const SITES: [(&str, Site); 4] =
    [("q_proj", Site::Q), ("k_proj", Site::K), ("gate_proj", Site::Gate), ("down_proj", Site::Down)];

fn main() -> Result<()> {
    // SAFETY: no other thread has started yet.
    unsafe { attune::process::prepare() };
    let args = Args::parse();
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    let base = Base::open("bench", &args.model)?;
    let compute = match args.precision.as_str() {
        "f32" => Compute::F32,
        "bf16" => Compute::Bf16,
        _ => base.auto_compute(),
    };
    let base = base.computing(compute);
    let mut found = Map::new();
    for (name, site) in SITES {
        let linear = base.linear(0, site);
        let (out, width) = linear.shape();
        let x = random(args.rows, width)?;
        time(&mut found, &format!("{name} {width} to {out}"), args.repetitions, || linear.forward(&x))?;
    }
    let width = base.linear(0, Site::Q).shape().1;
    for rank in &args.ranks {
        let (x, a, b) = (random(args.rows, width)?, random(*rank, width)?, random(width, *rank)?);
        let name = format!("rank {rank} of {width}");
        time(&mut found, &name, args.repetitions, || ops::low_rank_delta(&x, &a, &b, 2.0))?;
    }
    println!("{}", Value::Object(found));
    Ok(())
}

fn random(rows: usize, cols: usize) -> Result<Var> {
    Ok(Var::from_tensor(&Tensor::randn(0f32, 1.0, (rows, cols), &Device::Cpu)?)?)
}

/// The product alone, and its gradients alone.
fn time(
    found: &mut Map<String, Value>,
    name: &str,
    repetitions: usize,
    product: impl Fn() -> candle_core::Result<Tensor>,
) -> Result<()> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..repetitions + 2 {
        let begun = Instant::now();
        let y = product()?;
        times[0].push(begun.elapsed().as_secs_f64() * 1000.0);
        let begun = Instant::now();
        black_box(y.backward()?);
        times[1].push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    for (what, mut times) in ["forward", "backward"].into_iter().zip(times) {
        times.drain(..2);
        times.sort_by(f64::total_cmp);
        found.insert(format!("{name}, {what}"), json!(times.get(times.len() / 2).context("nothing was repeated")?));
    }
    Ok(())
}
