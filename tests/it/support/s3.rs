//! An S3 server in this process, behind a wire that can be slow or cut.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

pub const BUCKET: &str = "attune-test";
/// What its only user is called, and their secret.
pub const USER: (&str, &str) = ("id", "secret");

/// Serves a folder with the bucket in it; gives its address.
pub async fn serve(dir: &Path) -> String {
    std::fs::create_dir(dir.join(BUCKET)).unwrap();
    let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(dir).unwrap());
    service.set_auth(SimpleAuth::from_single(USER.0, USER.1));
    let service = service.build();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (connection, _) = listener.accept().await.unwrap();
            let service = service.clone();
            tokio::spawn(async move {
                let builder = Builder::new(TokioExecutor::new());
                _ = builder.serve_connection(TokioIo::new(connection), service).await;
            });
        }
    });
    address
}

const OPEN: u8 = 0;
const DRIPS: u8 = 1;
const CUT: u8 = 2;

/// The server and the wire to it.
pub struct Store {
    pub endpoint: String,
    wire: Arc<AtomicU8>,
    _dir: tempfile::TempDir,
}

impl Store {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(dir.path()).await;
        let wire = Arc::new(AtomicU8::new(OPEN));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = wire.clone();
        tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                tokio::spawn(carry(near, server.clone(), state.clone()));
            }
        });
        Self { endpoint, wire, _dir: dir }
    }

    /// Answers come drop by drop from now on, or at once again.
    pub fn drip(&self, drips: bool) {
        self.wire.store(if drips { DRIPS } else { OPEN }, Relaxed);
    }

    /// Nothing comes through any more.
    pub fn cut(&self) {
        self.wire.store(CUT, Relaxed);
    }
}

async fn carry(near: TcpStream, server: String, state: Arc<AtomicU8>) {
    let Ok(far) = TcpStream::connect(server).await else { return };
    let ((mut near_read, mut near_write), (mut far_read, mut far_write)) = (near.into_split(), far.into_split());
    let there = tokio::spawn(async move { tokio::io::copy(&mut near_read, &mut far_write).await });
    let mut buffer = [0; 512];
    loop {
        let n = match far_read.read(&mut buffer).await {
            Ok(n) if n > 0 => n,
            _ => break,
        };
        match state.load(Relaxed) {
            DRIPS => tokio::time::sleep(Duration::from_millis(30)).await,
            CUT => break,
            _ => {}
        }
        if near_write.write_all(&buffer[..n]).await.is_err() {
            break;
        }
    }
    there.abort();
}
