//! OpenAI's own packages for Python and Node against the real server: only the address and the key are ours.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use crate::{
    api::tools::with_template,
    support::{
        not_run,
        server::{BASE, KEY, Server},
    },
};

/// The releases that the tests drive.
const PACKAGE: &str = "openai==3.54.0";
const NODE_PACKAGE: &str = "openai@7.59.0";

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

/// A script where node finds the package: a folder under target/, made once.
fn node_script(name: &str) -> PathBuf {
    let _one = INSTALL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("node-{NODE_PACKAGE}"));
    let done = folder.join("installed");
    if !done.is_file() {
        fs::create_dir_all(&folder).unwrap();
        run(Command::new("npm")
            .args(["install", "--no-audit", "--no-fund", "--prefix"])
            .arg(&folder)
            .arg(NODE_PACKAGE));
        fs::write(done, "").unwrap();
    }
    let script = folder.join(name);
    fs::copy(scripts().join(name), &script).unwrap();
    script
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/sdk")
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{out}\n{err}");
    out.into_owned()
}

fn drive(server: &Server, script: &str) {
    let (program, script) = match script.ends_with(".mjs") {
        true => ("node".into(), node_script(script)),
        false => (python(), scripts().join(script)),
    };
    let output = run(Command::new(program).arg(script).arg(format!("{}/v1", server.url)).arg(KEY).arg(BASE));
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
fn the_openai_package_for_node_drives_the_whole_path() {
    if Command::new("npm").arg("--version").output().is_err() {
        return not_run("Node with npm (apt-get install nodejs npm)");
    }
    drive(&with_template(), "drive.mjs");
}

#[test]
fn the_openai_package_runs_batches() {
    drive(&Server::start(), "batches.py");
}
