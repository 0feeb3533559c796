//! What learning from preferences and rewards does, in small: tiny models made from a seed, and judges that are rules.
//!
//! ```text
//! cargo bench --bench alignment                        # all, three seeds
//! cargo bench --bench alignment -- --only grpo --seeds 1
//! cargo bench --bench alignment -- --scale 0.2         # a fifth of the rows and steps, to see that it runs
//! ```
//!
//! Prints one line of JSON for each effect and seed, then whether each effect was seen in all of them. Everything but
//! the times is a function of the seed.

mod effects;
mod lab;
#[path = "../../tests/it/support/tiny.rs"]
#[allow(dead_code, reason = "tests use more of it")]
mod tiny;

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Parser;
use effects::EFFECTS;
use lab::Lab;
use serde_json::json;

/// As the program has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Args {
    /// One effect.
    #[arg(long)]
    only: Option<String>,
    /// Seeds 1 to this.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Of the rows and steps.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Cargo adds it.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    // SAFETY: no other thread has started yet. `main.rs` of the program says why.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    let args = Args::parse();
    let chosen: Vec<_> =
        EFFECTS.iter().filter(|effect| args.only.as_ref().is_none_or(|only| only == effect.name)).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = EFFECTS.iter().map(|effect| effect.name).collect();
        bail!("--only takes one of {}", names.join(", "));
    }
    for effect in chosen {
        let mut seen = true;
        for seed in 1..=args.seeds {
            let since = Instant::now();
            let found = (effect.show)(&Lab::new(seed, args.scale)?)?;
            seen &= found.seen;
            let seconds = since.elapsed().as_secs_f64();
            println!(
                "{}",
                json!({"effect": effect.name, "seed": seed, "seconds": seconds, "seen": found.seen,
                                  "figures": found.figures})
            );
        }
        println!("{}: {} — {}", effect.name, effect.claim, if seen { "seen" } else { "NOT SEEN" });
    }
    Ok(())
}
