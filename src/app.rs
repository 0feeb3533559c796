//! Puts the process together: database, store, bases, engine, worker, HTTP.

use std::{
    fs,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use fs4::fs_std::FileExt;
use tokio::{net::TcpListener, sync::Notify, task::JoinHandle};

use crate::{
    api::{self, AppState, serve},
    config::{Config, DatabaseConfig, NodeConfig, Pull, WorkerConfig},
    database,
    db::Db,
    inference::{Bases, DiskSettings, EngineSettings, Handle, Resident},
    jobs::{
        self, Worker,
        batch::{self, BatchContext, Runners},
    },
    keys,
    model::{Base, Compute, Held, device, kernels::Isa, ops::compose},
    outbound::{self, Source, Web},
    process,
    service::Service,
    storage::{self, BlobStore, S3Settings},
    text::Text,
};

/// How often what was kept for too long is dropped though nobody reads it.
const FORGETTING: Duration = Duration::from_secs(3600);
/// How long streams may go on once the process stops.
const GRACE: Duration = Duration::from_secs(10);

/// How often the database is asked which adapters are pinned.
const PINS: Duration = Duration::from_secs(10);

/// What every process has that trains or serves.
struct Node {
    db: Db,
    store: Arc<dyn BlobStore>,
    bases: Bases,
    memory_limit: Option<u64>,
    web: Web,
    /// Held until the process ends: one process owns an embedded database.
    lock: Option<fs::File>,
}

impl Node {
    /// `compute` is for serving: a training job chooses its own.
    async fn open(config: &NodeConfig, compute: Compute) -> anyhow::Result<Self> {
        prepare_threads(config)?;
        let dir = &config.database.data_dir;
        fs::create_dir_all(dir).with_context(|| format!("the data directory {}", dir.display()))?;
        let lock = if database::is_embedded(&config.database) { Some(lock(dir)?) } else { None };
        let db = database::open(&config.database).await?;
        let s3 = S3Settings { endpoint: config.s3_endpoint.clone(), ..S3Settings::default() };
        let store = storage::open(&config.blob_store(), &s3).await.context("the blob store")?;
        let bases = load_bases(config, compute).await?;
        let web = Web::new(config.outbound.settings()).context("the client for judges elsewhere")?;
        Ok(Self { db, store, bases, memory_limit: config.memory_limit, web, lock })
    }

    fn start_engine(&self, settings: EngineSettings) -> std::io::Result<Handle> {
        Handle::start(self.bases.clone(), self.store.clone(), tokio::runtime::Handle::current(), settings)
    }

    fn start_workers(&self, count: u8, wake: &Arc<Notify>, engine: &Handle) -> Vec<Worker> {
        let context = || jobs::Context {
            db: self.db.clone(),
            store: self.store.clone(),
            bases: self.bases.clone(),
            memory_limit: self.memory_limit,
            engine: engine.clone(),
            web: self.web.clone(),
        };
        (0..count).map(|_| jobs::start(context(), wake.clone())).collect()
    }
}

async fn stop_all(workers: Vec<Worker>) {
    futures::future::join_all(workers.into_iter().map(Worker::stop)).await;
}

/// A server at work.
pub struct Running {
    pub address: SocketAddr,
    /// Where a key is that this server accepts; none if it was made elsewhere.
    pub key_file: Option<PathBuf>,
    state: AppState,
    engine: Handle,
    workers: Vec<Worker>,
    batches: Runners,
    /// What is done now and then.
    chores: [JoinHandle<()>; 2],
    http: serve::Http,
    _lock: Option<fs::File>,
}

/// Starts everything; answers when requests are welcome.
pub async fn start(config: &Config) -> anyhow::Result<Running> {
    let compute = if config.exact { Compute::F32 } else { Compute::Int8 };
    let node = Node::open(&config.node, compute).await?;
    if node.db.is_sqlite() {
        node.db.release_local_claims().await?;
    }
    let key_file = keys::first(&node.db, config).await?;
    let settings = EngineSettings {
        max_batch: config.max_batch,
        queue: config.queue,
        adapter_budget_bytes: config.adapter_budget,
        adapter_disk: config.adapter_disk().map(|(dir, budget)| DiskSettings { dir, budget }),
        kv_bytes: config.kv_memory,
        training_share: config.training_share,
        ..EngineSettings::default()
    };
    let engine = node.start_engine(settings)?;
    let wake = Arc::new(Notify::new());
    let workers = node.start_workers(config.workers, &wake, &engine);
    let wake_batches = Arc::new(Notify::new());
    let Node { db, store, bases, memory_limit, web, lock } = node;
    let service = Service {
        db: db.clone(),
        store: store.clone(),
        bases,
        engine: engine.clone(),
        wake,
        wake_batches: wake_batches.clone(),
        max_upload: config.max_upload,
        memory_limit,
        web,
        retention_days: config.completion_retention,
    };
    let chores = [tokio::spawn(follow_pins(service.clone())), tokio::spawn(forget(service.clone()))];
    let state = AppState::new(service);
    let answers = Arc::new(api::Inside(state.clone()));
    let batches = batch::start(BatchContext { db, store, answers }, wake_batches);
    let listener = TcpListener::bind(config.listen).await.with_context(|| format!("listening on {}", config.listen))?;
    let address = listener.local_addr()?;
    let http = serve::start(listener, api::router(state.clone()));
    Ok(Running { address, key_file, state, engine, workers, batches, chores, http, _lock: lock })
}

/// Keeps what is pinned at hand; other processes pin too.
async fn follow_pins(service: Service) {
    loop {
        if let Err(problem) = service.refresh_pins().await {
            tracing::warn!("pinned adapters: {}", problem.message);
        }
        tokio::time::sleep(PINS).await;
    }
}

impl Running {
    /// Unready first, then streams end, then training checkpoints and gives its claim back.
    pub async fn stop(self) {
        self.state.drain();
        self.chores.iter().for_each(JoinHandle::abort);
        let ((), (), _) = tokio::join!(stop_all(self.workers), self.batches.stop(), self.engine.stop(GRACE));
        self.http.stop(GRACE).await;
    }
}

async fn forget(service: Service) {
    loop {
        if let Err(problem) = service.forget_old().await {
            tracing::warn!("what was kept for too long stays for now: {}", problem.message);
        }
        tokio::time::sleep(FORGETTING).await;
    }
}

fn prepare_threads(config: &NodeConfig) -> anyhow::Result<()> {
    match config.cpu_kernels.as_deref() {
        Some("candle") => compose(),
        Some(kernels) => Isa::force(kernels).map_err(anyhow::Error::msg)?,
        None => tracing::info!("CPU kernels: {}", Isa::chosen().name()),
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

async fn load_bases(config: &NodeConfig, compute: Compute) -> anyhow::Result<Bases> {
    let (mut residents, device) = (Vec::new(), device::open(&config.device).context("--device")?);
    for model in &config.models {
        let (id, source) = model.split_once('=').filter(|(id, _)| !id.contains(':')).unwrap_or((model, model));
        ensure!(is_model_id(id), "--model {model}: the id takes 1 to 64 letters, digits, dots, dashes and underscores");
        let (source, held) = held(source);
        let source = Source::parse(source).with_context(|| format!("--model {model}"))?;
        let path = outbound::pull(&source, &config.hub.settings(), &config.database.data_dir.join("models"))
            .await
            .with_context(|| format!("--model {model}"))?;
        let (name, device) = (id.to_owned(), device.clone());
        let loaded = tokio::task::spawn_blocking(move || {
            let base = Base::open_held(&name, &path, held).with_context(|| path.display().to_string())?;
            let base = base.on(&device).computing(compute);
            let text = Text::open(&path).with_context(|| path.display().to_string())?;
            anyhow::Ok(Resident { base, text: Arc::new(text) })
        });
        residents.push(loaded.await?.with_context(|| format!("--model {model}"))?);
    }
    Ok(Bases::new(residents))
}

/// What is quantised at load says so before its source.
fn held(source: &str) -> (&str, Held) {
    let prefixes = [("nf4:", Held::Nf4), ("nf4-dq:", Held::Nf4Dq)];
    let found = prefixes.into_iter().find_map(|(prefix, held)| Some((source.strip_prefix(prefix)?, held)));
    found.unwrap_or((source, Held::AsStored))
}

fn is_model_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// `attune migrate`
pub async fn migrate(config: &DatabaseConfig) -> anyhow::Result<()> {
    database::open(config).await?;
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
    process::settle();
    println!("listening on http://{}", running.address);
    std::io::stdout().flush()?;
    serve::stop_signal().await?;
    running.stop().await;
    Ok(())
}

/// `attune worker`
pub async fn work_until_stopped(config: &WorkerConfig) -> anyhow::Result<()> {
    let shared = "workers and the server share";
    if database::is_embedded(&config.node.database) {
        bail!("--database-url: {shared} a PostgreSQL, postgres://…; SQLite belongs to one server");
    }
    if config.node.blob_store.is_none() {
        bail!("--blob-store: {shared} a blob store, file:DIR or s3://BUCKET/PREFIX; name the server's");
    }
    let node = Node::open(&config.node, Compute::F32).await?;
    // Nobody is served here; objectives that learn from completions draw them.
    let engine = node.start_engine(EngineSettings::default())?;
    let workers = node.start_workers(config.workers, &Arc::new(Notify::new()), &engine);
    let bases: Vec<_> = node.bases.iter().map(|resident| resident.base.info.id.as_str()).collect();
    println!("waiting for jobs on {}", bases.join(", "));
    std::io::stdout().flush()?;
    serve::stop_signal().await?;
    stop_all(workers).await;
    engine.stop(GRACE).await;
    Ok(())
}
