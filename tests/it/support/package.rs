//! Packages from PyPI, fetched by pip once and kept under target/.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use attune::outbound;
use tokio::runtime::Runtime;

/// One fetch at a time: tests of one process run side by side.
static FETCH: Mutex<()> = Mutex::new(());

/// The unpacked source of a package.
pub fn source(name: &str, version: &str) -> PathBuf {
    let _one = FETCH.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("packages");
    let done = cache.join(format!("{name}-{version}"));
    if !done.is_dir() {
        fs::create_dir_all(&cache).unwrap();
        let temporary = tempfile::tempdir_in(&cache).unwrap();
        let wanted = format!("{name}=={version}");
        let pip = Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name, &wanted, "--dest"])
            .arg(temporary.path())
            .output()
            .unwrap();
        assert!(pip.status.success(), "{}", String::from_utf8_lossy(&pip.stderr));
        let archive = fs::read_dir(temporary.path()).unwrap().next().unwrap().unwrap().path();
        let unpacked = temporary.path().join("unpacked");
        tar::Archive::new(flate2::read::GzDecoder::new(File::open(archive).unwrap())).unpack(&unpacked).unwrap();
        let top = fs::read_dir(&unpacked).unwrap().next().unwrap().unwrap().path();
        fs::rename(top, &done).unwrap();
    }
    done
}

/// The file of the built-in base, SmolLM2-135M-Instruct, fetched as the server fetches it.
pub fn smollm2() -> PathBuf {
    let _one = FETCH.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("models");
    let source = outbound::Source::parse(outbound::BUILT_IN).unwrap();
    // On a thread of its own, so that tests with a runtime of theirs may call it.
    let pull =
        move || Runtime::new().unwrap().block_on(outbound::pull(&source, &outbound::Hub::default(), &cache)).unwrap();
    std::thread::spawn(pull).join().unwrap()
}
