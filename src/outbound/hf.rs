//! Models from the Hugging Face hub, kept in the layout of its own tools: `hub/models--ORG--REPO/snapshots/COMMIT/FILE`,
//! with the commit of a branch in `refs/BRANCH`.
//!
//! What is there is used as it is and the hub is not asked again: a base must not change under its adapters because its
//! branch moved, and a server must start when the hub is away.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::{PullError, io};

/// How the hub is reached. The names are those of its own tools.
#[derive(Clone, Debug)]
pub struct Hub {
    /// `HF_ENDPOINT`
    pub endpoint: String,
    /// `HF_TOKEN`, for private and gated models.
    pub token: Option<String>,
    /// `HF_HOME`; the cache of other sources if it is not set.
    pub home: Option<PathBuf>,
}

impl Default for Hub {
    fn default() -> Self {
        Hub { endpoint: "https://huggingface.co".to_owned(), token: None, home: None }
    }
}

/// A repository at a revision, and the one file of it that is the model, if it is one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubModel {
    /// `ORG/REPO`
    pub repo: String,
    pub revision: String,
    pub file: Option<String>,
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

/// The file, or the directory of the snapshot.
pub(super) async fn pull(model: &HubModel, hub: &Hub, cache: &Path) -> Result<PathBuf, PullError> {
    let home = hub.home.clone().unwrap_or_else(|| cache.join("huggingface"));
    let dir = home.join("hub").join(format!("models--{}", model.repo.replace('/', "--")));
    if let Some(there) = cached(model, &dir) {
        return Ok(there);
    }
    let client = Client::new(hub)?;
    let revision: Revision = client.revision(model).await?;
    if !is_commit(&revision.sha) {
        return Err(PullError::Failed(format!("the hub names {:?} as the commit of {}", revision.sha, model.repo)));
    }
    let snapshot = dir.join("snapshots").join(&revision.sha);
    for file in wanted(model, &revision)? {
        let target = snapshot.join(&file.rfilename);
        if !target.exists() {
            client.download(model, &revision.sha, file, &target).await?;
        }
    }
    if model.revision != revision.sha {
        remember(&dir.join("refs").join(&model.revision), &revision.sha)?;
    }
    Ok(match &model.file {
        Some(file) => snapshot.join(file),
        None => snapshot,
    })
}

/// What an earlier pull, or another tool, has left here.
fn cached(model: &HubModel, dir: &Path) -> Option<PathBuf> {
    let commit = match fs::read_to_string(dir.join("refs").join(&model.revision)) {
        Ok(commit) => commit.trim().to_owned(),
        Err(_) => model.revision.clone(),
    };
    if !is_commit(&commit) {
        return None;
    }
    let snapshot = dir.join("snapshots").join(commit);
    match &model.file {
        Some(file) => Some(snapshot.join(file)).filter(|path| path.is_file()),
        None => is_whole(&snapshot).then_some(snapshot),
    }
}

/// Whether a snapshot has a model's every file: other tools fetch parts of one, and we may have been stopped.
fn is_whole(snapshot: &Path) -> bool {
    let has = |name: &str| snapshot.join(name).is_file();
    let shards = || {
        let index = fs::read(snapshot.join("model.safetensors.index.json")).ok()?;
        let index: serde_json::Value = serde_json::from_slice(&index).ok()?;
        let shards = index["weight_map"].as_object()?.values();
        Some(shards.into_iter().all(|shard| shard.as_str().is_some_and(has)))
    };
    has("config.json") && has("tokenizer.json") && (has("model.safetensors") || shards().unwrap_or(false))
}

/// Which of a revision's files to fetch. The weights come last, so that a small file that is missing costs no gigabytes.
fn wanted<'a>(model: &HubModel, revision: &'a Revision) -> Result<Vec<&'a Sibling>, PullError> {
    let is_wanted = |name: &str| match &model.file {
        Some(file) => name == file,
        None => is_of_model(name),
    };
    let mut files: Vec<&Sibling> = revision.siblings.iter().filter(|file| is_wanted(&file.rfilename)).collect();
    files.sort_by_key(|file| file.rfilename.ends_with(".safetensors"));
    let what = match &model.file {
        Some(file) if files.is_empty() => file,
        None if !files.iter().any(|file| file.rfilename.ends_with(".safetensors")) => "safetensors weights",
        _ => return Ok(files),
    };
    Err(PullError::Failed(format!("{} at {} has no {what}", model.repo, model.revision)))
}

/// Whether a model in Hugging Face layout reads this file. `consolidated` files hold the same weights once more.
fn is_of_model(name: &str) -> bool {
    let plain = ["config.json", "generation_config.json", "chat_template.jinja", "model.safetensors.index.json"];
    let is_tokenizer = name.starts_with("tokenizer") && name.ends_with(".json");
    let is_weights = name.ends_with(".safetensors") && !name.starts_with("consolidated");
    !name.contains(['/', '\\']) && (plain.contains(&name) || is_tokenizer || is_weights)
}

/// A commit's name becomes the name of a directory.
fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn remember(path: &Path, commit: &str) -> Result<(), PullError> {
    let dir = path.parent().unwrap_or(path);
    fs::create_dir_all(dir).map_err(|e| io(dir, e))?;
    let written = tempfile::NamedTempFile::new_in(dir).and_then(|file| {
        fs::write(file.path(), commit)?;
        Ok(file.persist(path)?)
    });
    written.map(drop).map_err(|e| io(path, e))
}

struct Client {
    http: reqwest::Client,
    hub: Hub,
}

impl Client {
    fn new(hub: &Hub) -> Result<Self, PullError> {
        let builder = reqwest::Client::builder().user_agent(concat!("attune/", env!("CARGO_PKG_VERSION")));
        let builder = builder.connect_timeout(Duration::from_secs(10)).read_timeout(Duration::from_secs(60));
        let http = builder.build().map_err(|e| PullError::Failed(format!("the client for the hub: {e}")))?;
        Ok(Client { http, hub: hub.clone() })
    }

    /// The answer to a GET below the endpoint, if it is a good one. The token goes to the endpoint alone: it is dropped
    /// where a redirection leads to another host.
    async fn get(&self, model: &HubModel, path: &str) -> Result<reqwest::Response, PullError> {
        let url = format!("{}/{path}", self.hub.endpoint.trim_end_matches('/'));
        let mut request = self.http.get(&url);
        if let Some(token) = &self.hub.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.map_err(|e| failed(&url, &e))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let why = match (status.as_u16(), &self.hub.token) {
            (401 | 403 | 404, None) => "it does not exist, or is private or gated and HF_TOKEN is not set",
            (401 | 403 | 404, Some(_)) => "it does not exist, or HF_TOKEN gives no access to it",
            _ => "the hub does not serve it now",
        };
        Err(PullError::Failed(format!("{} at {}: {why} ({url}: {status})", model.repo, model.revision)))
    }

    async fn revision(&self, model: &HubModel) -> Result<Revision, PullError> {
        let revision = model.revision.replace('/', "%2F");
        let answer = self.get(model, &format!("api/models/{}/revision/{revision}?blobs=true", model.repo)).await?;
        let url = answer.url().to_string();
        answer.json().await.map_err(|e| failed(&url, &e))
    }

    /// Fetches a file under another name, and gives it its own when its size and hash are right.
    async fn download(&self, model: &HubModel, commit: &str, file: &Sibling, target: &Path) -> Result<(), PullError> {
        let name = &file.rfilename;
        let mut answer = self.get(model, &format!("{}/resolve/{commit}/{name}", model.repo)).await?;
        let url = answer.url().to_string();
        let size = file.size.or(answer.content_length());
        let wrong = |what: String| PullError::Failed(format!("{} at {commit}: {name} {what}", model.repo));
        let dir = target.parent().unwrap_or(target);
        fs::create_dir_all(dir).map_err(|e| io(dir, e))?;
        let temporary = tempfile::NamedTempFile::new_in(dir).map_err(|e| io(dir, e))?;
        let out = temporary.as_file().try_clone().map_err(|e| io(target, e))?;
        let mut out = tokio::fs::File::from_std(out);
        let (mut got, mut hash) = (0, Sha256::new());
        while let Some(chunk) = answer.chunk().await.map_err(|e| failed(&url, &e))? {
            got += chunk.len() as u64;
            if size.is_some_and(|size| got > size) {
                break;
            }
            hash.update(&chunk);
            out.write_all(&chunk).await.map_err(|e| io(target, e))?;
        }
        if let Some(size) = size.filter(|size| *size != got) {
            return Err(wrong(format!("came with {got} bytes, not {size}")));
        }
        if let Some(lfs) = &file.lfs
            && !lfs.sha256.eq_ignore_ascii_case(&hex::encode(hash.finalize()))
        {
            return Err(wrong("came damaged: its hash is not the one that the hub names".to_owned()));
        }
        out.sync_all().await.map_err(|e| io(target, e))?;
        temporary.persist(target).map(drop).map_err(|e| io(target, e.error))
    }
}

fn failed(url: &str, error: &reqwest::Error) -> PullError {
    // reqwest's own words stop at "error sending request"; the reason is what caused it.
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    PullError::Failed(format!("{url}: {cause}"))
}
