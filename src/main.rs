//! The commands.

use attune::{
    app,
    config::{Cli, Command},
    keys, quickstart, telemetry,
};
use clap::Parser;

/// candle's temporaries are many and large: glibc gives their pages back and faults them in again each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // SAFETY: no other thread has started yet.
    unsafe { attune::process::prepare() };
    run()
}

#[tokio::main]
async fn run() -> std::process::ExitCode {
    telemetry::start("info");
    let result = match Cli::parse().command {
        Command::Serve(config) => app::serve_until_stopped(&config).await,
        Command::Worker(config) => app::work_until_stopped(&config).await,
        Command::Quickstart(config) => quickstart::run(&config).await,
        Command::Pull(pull) => app::pull(&pull).await,
        Command::Keys(command) => keys::run(command).await,
        Command::Openapi { path } => app::write_document(&path),
        Command::Migrate(config) => app::migrate(&config).await,
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("attune: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
