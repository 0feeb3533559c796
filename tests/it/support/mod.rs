//! What several tests need.

pub mod chaotic;
pub mod counting;
pub mod elsewhere;
pub mod faulty;
pub mod gguf;
pub mod package;
pub mod postgres;
pub mod quantised;
pub mod s3;
pub mod server;
pub mod stage;
pub mod store;
pub mod tiny;
pub mod training;

/// Says that a test was not run for want of a program; on a CI machine that is a failure.
pub fn not_run(program: &str) {
    let is_ci = std::env::var_os("CI").is_some_and(|ci| !ci.is_empty() && ci != "false");
    assert!(!is_ci, "not installed: {program}");
    eprintln!("NOT RUN: this test needs {program}");
}
