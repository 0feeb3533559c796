//! Puts the process together: database, store, bases, engine, worker, HTTP.

use std::{
    fs,
    io::Write,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use fs4::fs_std::FileExt;
use tokio::net::TcpListener;

use crate::{
    api::{self, AppState, serve},
    config::{Config, Pull},
    db::Db,
    domain::{ApiKey, Scope, id},
    inference::{Bases, EngineSettings, Handle, Resident, sha256},
    jobs::{self, Worker},
    model::{Base, kernels::Isa},
    outbound::{self, Source},
    service::Service,
    storage::{self, S3Settings},
    text::Text,
};

/// How long streams may go on once the process stops.
const GRACE: Duration = Duration::from_secs(10);

/// A server at work.
pub struct Running {
    pub address: SocketAddr,
    /// Where a key is that this server accepts; none if it was made elsewhere.
    pub key_file: Option<PathBuf>,
    state: AppState,
    engine: Handle,
    worker: Worker,
    http: serve::Http,
    /// Held until the process ends: one process owns an embedded database.
    _lock: Option<fs::File>,
}

/// Starts everything; answers when requests are welcome.
pub async fn start(config: &Config) -> anyhow::Result<Running> {
    prepare_device(config)?;
    fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("the data directory {}", config.data_dir.display()))?;
    let db = Db::connect(&config.database_url()).await.context("the database")?;
    let lock = if db.is_sqlite() { Some(lock(&config.data_dir)?) } else { None };
    db.migrate().await?;
    if db.is_sqlite() {
        db.release_local_claims().await?;
    }
    let key_file = first_key(&db, config).await?;
    let s3 = S3Settings { endpoint: config.s3_endpoint.clone(), ..S3Settings::default() };
    let store = storage::open(&config.blob_store(), &s3).await.context("the blob store")?;
    let bases = load_bases(config).await?;
    let settings = EngineSettings {
        max_batch: config.max_batch,
        queue: config.queue,
        adapter_budget_bytes: config.adapter_budget,
        ..EngineSettings::default()
    };
    let engine = Handle::start(bases.clone(), store.clone(), tokio::runtime::Handle::current(), settings)?;
    let worker = jobs::start(jobs::Context { db: db.clone(), store: store.clone(), bases: bases.clone() });
    let wake = worker.waker();
    let service = Service { db, store, bases, engine: engine.clone(), wake, max_upload: config.max_upload };
    let state = AppState::new(service);
    let listener = TcpListener::bind(config.listen).await.with_context(|| format!("listening on {}", config.listen))?;
    let address = listener.local_addr()?;
    let http = serve::start(listener, api::router(state.clone()));
    Ok(Running { address, key_file, state, engine, worker, http, _lock: lock })
}

impl Running {
    /// Unready first, then streams end, then training checkpoints and gives its claim back.
    pub async fn stop(self) {
        self.state.drain();
        let (_, _) = tokio::join!(self.worker.stop(), self.engine.stop(GRACE));
        self.http.stop(GRACE).await;
    }
}

fn prepare_device(config: &Config) -> anyhow::Result<()> {
    match config.device.split(':').next() {
        Some("cpu") => {}
        Some("cuda") => bail!("--device {}: this build has no CUDA support", config.device),
        _ => bail!("--device {}: neither cpu nor cuda[:N]", config.device),
    }
    if let Some(kernels) = &config.cpu_kernels {
        Isa::force(kernels).map_err(anyhow::Error::msg)?;
    }
    if let Some(threads) = config.threads {
        ensure!(threads > 0, "--threads is 0, below 1");
        // Fails when the pool runs already: a second server in one process keeps the first one's.
        _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    Ok(())
}

fn lock(dir: &Path) -> anyhow::Result<fs::File> {
    let path = dir.join("lock");
    let file = fs::File::create(&path).with_context(|| path.display().to_string())?;
    if !file.try_lock_exclusive()? {
        bail!("{} is used by another attune process", dir.display());
    }
    Ok(file)
}

async fn load_bases(config: &Config) -> anyhow::Result<Bases> {
    let mut residents = Vec::new();
    for model in &config.models {
        let (id, source) = model.split_once('=').filter(|(id, _)| !id.contains(':')).unwrap_or((model, model));
        ensure!(is_model_id(id), "--model {model}: the id takes 1 to 64 letters, digits, dots, dashes and underscores");
        let source = Source::parse(source).with_context(|| format!("--model {model}"))?;
        let path = outbound::pull(&source, &config.hub.settings(), &config.data_dir.join("models"))
            .await
            .with_context(|| format!("--model {model}"))?;
        let name = id.to_owned();
        let loaded = tokio::task::spawn_blocking(move || {
            let base = Base::open(&name, &path).with_context(|| path.display().to_string())?;
            let text = Text::open(&path).with_context(|| path.display().to_string())?;
            anyhow::Ok(Resident { base, text: Arc::new(text) })
        });
        residents.push(loaded.await?.with_context(|| format!("--model {model}"))?);
    }
    Ok(Bases::new(residents))
}

fn is_model_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// The bootstrap key, or a key of our own if there is none at all.
async fn first_key(db: &Db, config: &Config) -> anyhow::Result<Option<PathBuf>> {
    let path = config.data_dir.join("api_key");
    if let Some(key) = &config.api_key {
        let fits = (20..=200).contains(&key.len()) && key.chars().all(|c| c.is_ascii_graphic());
        ensure!(fits, "ATTUNE_API_KEY takes 20 to 200 printable characters");
        keep_key(db, key, "default", vec![Scope::All]).await?;
    } else if !db.has_keys().await? {
        let key = create_key(db, "default", vec![Scope::All]).await?;
        let mut file = fs::OpenOptions::new();
        let file = file.create(true).write(true).truncate(true).mode(0o600).open(&path);
        let mut file = file.with_context(|| path.display().to_string())?;
        writeln!(file, "{key}")?;
        file.sync_all()?;
        eprintln!("a first API key was made: it is in {}", path.display());
    }
    Ok(path.exists().then_some(path))
}

async fn keep_key(db: &Db, key: &str, project: &str, scopes: Vec<Scope>) -> anyhow::Result<()> {
    let record = ApiKey {
        id: id::new("key-"),
        project: project.to_owned(),
        sha256: sha256(key.as_bytes()),
        scopes,
        created_at: jobs::now(),
        revoked_at: None,
    };
    Ok(db.insert_key(&record).await?)
}

/// A new key; only its hash is kept.
pub async fn create_key(db: &Db, project: &str, scopes: Vec<Scope>) -> anyhow::Result<String> {
    let fits = (1..=64).contains(&project.len());
    let plain = project.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    ensure!(fits && plain, "a project takes 1 to 64 letters, digits, dashes and underscores");
    let key = format!("sk-{}", id::random(48));
    keep_key(db, &key, project, scopes).await?;
    Ok(key)
}

/// `attune keys create`
pub async fn print_new_key(config: &Config, project: &str, scopes: Vec<Scope>) -> anyhow::Result<()> {
    fs::create_dir_all(&config.data_dir)?;
    let db = Db::connect(&config.database_url()).await?;
    db.migrate().await?;
    println!("{}", create_key(&db, project, scopes).await?);
    Ok(())
}

/// `attune migrate`
pub async fn migrate(config: &Config) -> anyhow::Result<()> {
    fs::create_dir_all(&config.data_dir)?;
    Db::connect(&config.database_url()).await?.migrate().await?;
    println!("the database is up to date");
    Ok(())
}

/// `attune pull`
pub async fn pull(pull: &Pull) -> anyhow::Result<()> {
    let path =
        outbound::pull(&Source::parse(&pull.source)?, &pull.hub.settings(), &pull.data_dir.join("models")).await?;
    println!("{}", path.display());
    Ok(())
}

/// `attune openapi`
pub fn write_document(path: &Path) -> anyhow::Result<()> {
    let text = api::document().to_pretty_json()?;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
    println!("{}", path.display());
    Ok(())
}

/// `attune serve`
pub async fn serve_until_stopped(config: &Config) -> anyhow::Result<()> {
    let running = start(config).await?;
    println!("listening on http://{}", running.address);
    std::io::stdout().flush()?;
    serve::stop_signal().await?;
    running.stop().await;
    Ok(())
}
