//! OpenAI's own Python package against the real server: only `base_url` and `api_key` are ours.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use crate::{
    api::tools::with_template,
    support::server::{BASE, KEY, Server},
};

/// The release that the test drives.
const PACKAGE: &str = "openai==3.54.0";

/// One installation at a time: tests of one process run side by side.
static INSTALL: Mutex<()> = Mutex::new(());

/// A Python that has the package: a venv under target/, made once.
fn python() -> PathBuf {
    let _one = INSTALL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join(PACKAGE.replace("==", "-"));
    let (python, done) = (venv.join("bin/python"), venv.join("installed"));
    if !done.is_file() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv));
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", PACKAGE]));
        fs::write(done, "").unwrap();
    }
    python
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{out}\n{err}");
    out.into_owned()
}

fn drive(server: &Server, script: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/sdk").join(script);
    let output = run(Command::new(python()).arg(script).arg(format!("{}/v1", server.url)).arg(KEY).arg(BASE));
    assert_eq!(output.trim().lines().last(), Some("done"), "{output}");
}

#[test]
fn the_openai_package_drives_the_whole_path() {
    drive(&Server::start(), "drive.py");
}

#[test]
fn the_openai_package_calls_functions() {
    drive(&with_template(), "tools.py");
}

#[test]
fn the_openai_package_runs_batches() {
    drive(&Server::start(), "batches.py");
}
