//! What learning from preferences and rewards does, in small: tiny models that learn a language of letters first, and
//! judges that are rules.
//!
//! ```text
//! cargo bench --bench alignment                                # all, seeds 1 to 3
//! cargo bench --bench alignment -- --only grpo --seeds 1
//! cargo bench --bench alignment -- --first 101 --rate 3e-3     # to tune, on other seeds than those reported
//! cargo bench --bench alignment -- --scale 0.2                 # a fifth of the rows and steps, to see that it runs
//! ```
//!
//! Prints one line of JSON for each effect and seed, then whether each effect was seen in all of them. Everything but
//! the times is a function of the seed. `report.py` makes docs/alignment.svg and a table of the lines.

mod effects;
mod lab;
mod language;
mod settings;
#[path = "../../tests/it/support/tiny.rs"]
#[allow(dead_code, reason = "tests use more of it")]
mod tiny;

use std::{path::PathBuf, sync::Arc, time::Instant};

use anyhow::{Result, bail};
use clap::Parser;
use effects::EFFECTS;
use lab::Lab;
use serde_json::json;
use settings::Settings;

/// As the program has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Args {
    /// These effects.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// So many seeds.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// From this one.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Of the rows and steps.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Instead of settings.json.
    #[arg(long)]
    settings: Option<PathBuf>,
    /// The learning rate of all sides, instead of their own.
    #[arg(long)]
    rate: Option<f64>,
    /// Cargo adds it.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    // SAFETY: no other thread has started yet.
    unsafe { attune::process::prepare() };
    let args = Args::parse();
    let mut settings = Settings::read(args.settings.as_deref())?;
    for side in settings.sides.values_mut() {
        side.training.extend(args.rate.map(|rate| ("learning_rate".to_owned(), json!(rate))));
    }
    let settings = Arc::new(settings);
    let names: Vec<&str> = EFFECTS.iter().map(|effect| effect.name).collect();
    if args.only.iter().any(|only| !names.contains(&only.as_str())) {
        bail!("--only takes some of {}", names.join(","));
    }
    let is_chosen = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    let chosen: Vec<_> = EFFECTS.iter().filter(|effect| is_chosen(effect.name)).collect();
    let mut seen = vec![true; chosen.len()];
    for seed in args.first..args.first + args.seeds {
        let lab = Lab::new(seed, args.scale, settings.clone())?;
        for (effect, seen) in chosen.iter().zip(&mut seen) {
            let since = Instant::now();
            let found = (effect.show)(&lab)?;
            *seen &= found.seen;
            let (name, seconds) = (effect.name, since.elapsed().as_secs_f64());
            let line = json!({"effect": name, "seed": seed, "seconds": seconds, "seen": found.seen,
                              "figures": found.figures});
            println!("{line}");
        }
    }
    for (effect, seen) in chosen.iter().zip(seen) {
        println!("{}: {}: {}", effect.name, effect.claim, if seen { "seen" } else { "NOT SEEN" });
    }
    Ok(())
}
