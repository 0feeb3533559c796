//! Logs: one line an event on standard error. Never prompts, keys or rows.

use tracing_subscriber::EnvFilter;

/// What RUST_LOG says, or this.
pub fn start(filter: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::builder().parse_lossy(filter));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second start, in a test, keeps the first.
    _ = subscriber.try_init();
}
