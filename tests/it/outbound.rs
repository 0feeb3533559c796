//! Pulls from the Hugging Face hub, against a small hub of our own.

mod web;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use attune::outbound::{Hub, PullError, Source, pull};
use axum::{
    Json, Router,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Redirect, Response},
};
use serde_json::json;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

/// What the hub has, and what it was asked.
#[derive(Default)]
struct Shelf {
    files: BTreeMap<&'static str, Vec<u8>>,
    /// Sizes and hashes that it claims instead of the true ones.
    sizes: BTreeMap<&'static str, u64>,
    hashes: BTreeMap<&'static str, String>,
    /// Only who shows the token sees the model.
    is_private: bool,
    asked: Mutex<Vec<String>>,
}

impl Shelf {
    fn model() -> Self {
        let mut shelf = Shelf::default();
        for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
            shelf.files.insert(name, format!("{{\"name\":\"{name}\"}}").into());
        }
        shelf.files.insert("chat_template.jinja", b"{{ messages }}".to_vec());
        shelf.files.insert("model-00001-of-00002.safetensors", vec![1; 300_000]);
        shelf.files.insert("model-00002-of-00002.safetensors", vec![2; 5]);
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let index = json!({"weight_map": {"a": shards[0], "b": shards[1]}});
        shelf.files.insert("model.safetensors.index.json", index.to_string().into());
        for other in ["README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/config.json"] {
            shelf.files.insert(other, b"not wanted".to_vec());
        }
        shelf.files.insert("gguf/small.gguf", b"GGUF and more".to_vec());
        shelf
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

async fn answer(State(shelf): State<Arc<Shelf>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    shelf.asked.lock().unwrap().push(path.clone());
    let shown = request.headers().get("authorization").and_then(|value| value.to_str().ok());
    if shelf.is_private && shown != Some(&format!("Bearer {TOKEN}")) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if path == "/api/models/org/repo/revision/main" || path == "/api/models/org/repo/revision/refs%2Fpr%2F1" {
        let siblings = shelf.files.iter().map(|(name, data)| {
            let size = shelf.sizes.get(name).copied().unwrap_or(data.len() as u64);
            let hash = shelf.hashes.get(name).cloned().unwrap_or_else(|| hex::encode(Sha256::digest(data)));
            match name.ends_with(".safetensors") {
                true => {
                    json!({"rfilename": name, "size": size, "lfs": {"sha256": hash, "size": size, "pointerSize": 1}})
                }
                false => json!({"rfilename": name, "size": size}),
            }
        });
        return Json(json!({"sha": COMMIT, "siblings": siblings.collect::<Vec<_>>()})).into_response();
    }
    // The real hub sends large files from another place.
    if let Some(name) = path.strip_prefix(&format!("/org/repo/resolve/{COMMIT}/")) {
        return Redirect::temporary(&format!("/elsewhere/{name}")).into_response();
    }
    match path.strip_prefix("/elsewhere/").and_then(|name| shelf.files.get(name)) {
        Some(data) => data.clone().into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

struct Site {
    shelf: Arc<Shelf>,
    hub: Hub,
    cache: tempfile::TempDir,
    server: tokio::task::JoinHandle<()>,
}

impl Site {
    async fn new(shelf: Shelf) -> Self {
        let shelf = Arc::new(shelf);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(shelf.clone());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let hub = Hub { endpoint, token: None, home: None };
        Site { shelf, hub, cache: tempfile::tempdir().unwrap(), server }
    }

    async fn pull(&self, source: &str) -> Result<std::path::PathBuf, PullError> {
        pull(&Source::parse(source).unwrap(), &self.hub, self.cache.path()).await
    }

    async fn refusal(&self, source: &str) -> String {
        self.pull(source).await.unwrap_err().to_string()
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_model_is_fetched_once_into_the_layout_of_the_hub() {
    let site = Site::new(Shelf::model()).await;
    let dir = site.pull("hf:org/repo").await.unwrap();
    let repo = site.cache.path().join("huggingface/hub/models--org--repo");
    assert_eq!(dir, repo.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let expected = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&dir), expected);
    for name in expected {
        assert_eq!(fs::read(dir.join(name)).unwrap(), site.shelf.files[name], "{name}");
    }
    assert_eq!(site.shelf.asked().len(), 1 + 2 * expected.len());

    assert_eq!(site.pull("hf:org/repo").await.unwrap(), dir);
    assert_eq!(site.pull(&format!("hf:org/repo@{COMMIT}")).await.unwrap(), dir);
    assert!(site.shelf.asked().is_empty(), "what is there needs no hub");

    fs::remove_file(dir.join("model-00002-of-00002.safetensors")).unwrap();
    assert_eq!(site.pull("hf:org/repo").await.unwrap(), dir);
    let missing = "model-00002-of-00002.safetensors";
    let asked = ["/api/models/org/repo/revision/main".to_owned(), format!("/org/repo/resolve/{COMMIT}/{missing}")];
    assert_eq!(site.shelf.asked()[..2], asked, "only what is missing");
    assert_eq!(names(&dir), expected);
}

#[tokio::test]
async fn one_file_is_fetched_alone_and_hf_home_is_honoured() {
    let mut site = Site::new(Shelf::model()).await;
    let home = tempfile::tempdir().unwrap();
    site.hub.home = Some(home.path().to_owned());
    let file = site.pull("hf:org/repo@refs/pr/1:gguf/small.gguf").await.unwrap();
    let repo = home.path().join("hub/models--org--repo");
    assert_eq!(file, repo.join("snapshots").join(COMMIT).join("gguf/small.gguf"));
    assert_eq!(fs::read(&file).unwrap(), b"GGUF and more");
    assert_eq!(fs::read_to_string(repo.join("refs/refs/pr/1")).unwrap(), COMMIT);
    assert!(names(site.cache.path()).is_empty());
    site.server.abort();
    assert_eq!(site.pull("hf:org/repo@refs/pr/1:gguf/small.gguf").await.unwrap(), file);
    let away = site.refusal("hf:org/repo").await;
    assert!(away.starts_with(&format!("{}/api/models/org/repo/revision/main", site.hub.endpoint)), "{away}");
}

#[tokio::test]
async fn the_token_opens_a_private_model() {
    let mut site = Site::new(Shelf { is_private: true, ..Shelf::model() }).await;
    let message = site.refusal("hf:org/repo").await;
    assert!(message.starts_with("org/repo at main: it does not exist, or is private or gated and HF_TOKEN is not set"));
    site.hub.token = Some("wrong".to_owned());
    let message = site.refusal("hf:org/repo").await;
    assert!(message.contains("HF_TOKEN gives no access") && !message.contains("wrong"), "{message}");
    site.hub.token = Some(TOKEN.to_owned());
    site.pull("hf:org/repo").await.unwrap();
}

#[tokio::test]
async fn what_comes_wrong_is_refused_and_leaves_nothing() {
    let weights = "model-00001-of-00002.safetensors";
    let with_size = |size| Shelf { sizes: [(weights, size)].into(), ..Shelf::model() };
    let with_hash = Shelf { hashes: [(weights, "00".repeat(32))].into(), ..Shelf::model() };
    let spoilt = [
        (with_size(300_001), "came with 300000 bytes, not 300001"),
        (with_size(10), "bytes, not 10"),
        (with_hash, "came damaged"),
    ];
    for (shelf, part) in spoilt {
        let site = Site::new(shelf).await;
        let message = site.refusal("hf:org/repo").await;
        assert!(message.contains(weights) && message.contains(part), "{message}");
        let repo = site.cache.path().join("huggingface/hub/models--org--repo");
        let left = names(&repo.join("snapshots").join(COMMIT));
        assert!(left.iter().all(|name| !name.starts_with('.') && name != weights), "{left:?}");
        assert!(!repo.join("refs/main").exists());
    }
}

#[tokio::test]
async fn what_the_hub_does_not_have_is_named() {
    let mut shelf = Shelf::model();
    shelf.files.retain(|name, _| !name.starts_with("model"));
    let site = Site::new(shelf).await;
    assert_eq!(site.refusal("hf:org/repo").await, "org/repo at main has no safetensors weights");
    assert_eq!(site.refusal("hf:org/repo:x.gguf").await, "org/repo at main has no x.gguf");
    assert!(site.refusal("hf:org/other").await.contains("404"));
}
