//! One suite for every store: local files, and S3 spoken by an in-process server.

use std::sync::Arc;

use attune::storage::{self, BlobStore, ByteStream, Key, S3Settings, S3Store, StorageError};
use bytes::Bytes;
use futures::{StreamExt, stream};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tokio::net::TcpListener;

const BUCKET: &str = "attune-test";

fn file(id: &str) -> Key {
    Key::File { id: id.to_owned() }
}

fn part(job: &str, step: u64) -> Key {
    Key::Checkpoint { job: job.to_owned(), fence: 1, step, name: "trainer.json".to_owned() }
}

/// Pieces of uneven size that count up, so that a swap of parts shows.
fn pieces(total: usize) -> (Vec<u8>, ByteStream) {
    let all: Vec<u8> = (0..total).map(|i| (i / 251) as u8 ^ i as u8).collect();
    let mut rest = Bytes::from(all.clone());
    let mut chunks = Vec::new();
    let mut n = 1;
    while !rest.is_empty() {
        n = n * 7 % 300_007 + 1;
        chunks.push(Ok(rest.split_to(n.min(rest.len()))));
    }
    (all, stream::iter(chunks).boxed())
}

async fn behaves(store: Arc<dyn BlobStore>) {
    // A round trip, with the hash of a known text.
    let stored = store.put(&file("a"), Bytes::from_static(b"abc")).await.unwrap();
    assert_eq!(stored.bytes, 3);
    assert_eq!(stored.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(store.get(&file("a")).await.unwrap(), "abc");
    assert_eq!(store.size(&file("a")).await.unwrap(), 3);

    // Larger than two parts of a multipart upload.
    let (all, body) = pieces(20_000_003);
    let stored = store.put_stream(&file("large"), body, 20_000_003).await.unwrap();
    assert_eq!(stored.bytes, 20_000_003);
    assert_eq!(stored.sha256, attune::inference::sha256(&all));
    assert_eq!(store.get(&file("large")).await.unwrap(), all);

    // A limit, and a stream that breaks, leave nothing.
    for total in [100, 17_000_000] {
        let refused = store.put_stream(&file("big"), pieces(total).1, total as u64 - 1).await.unwrap_err();
        assert!(matches!(refused, StorageError::TooLarge { limit } if limit == total as u64 - 1), "{refused}");
        let broken = pieces(total).1.chain(stream::iter([Err(StorageError::Source("gone".to_owned()))])).boxed();
        let error = store.put_stream(&file("big"), broken, u64::MAX).await.unwrap_err();
        assert!(matches!(error, StorageError::Source(_)), "{error}");
        let missing = store.get(&file("big")).await.unwrap_err();
        assert!(matches!(missing, StorageError::NotFound(_)), "{missing}");
        assert!(matches!(store.size(&file("big")).await.unwrap_err(), StorageError::NotFound(_)));
    }

    // Deleting is idempotent; a job's checkpoints go without another's.
    store.delete(&file("a")).await.unwrap();
    store.delete(&file("a")).await.unwrap();
    assert!(matches!(store.get(&file("a")).await.unwrap_err(), StorageError::NotFound(_)));
    for key in [part("one", 1), part("one", 2), part("one-more", 1)] {
        store.put(&key, Bytes::from_static(b"x")).await.unwrap();
    }
    store.delete_checkpoints("one").await.unwrap();
    assert!(store.get(&part("one", 1)).await.is_err() && store.get(&part("one", 2)).await.is_err());
    assert_eq!(store.get(&part("one-more", 1)).await.unwrap(), "x");

    // Of two writers at once, one wins whole.
    let (a, b) = (Bytes::from(vec![1; 300_000]), Bytes::from(vec![2; 300_000]));
    let (first, second) = (file("race"), file("race"));
    let (x, y) = tokio::join!(store.put(&first, a.clone()), store.put(&second, b.clone()));
    x.and(y).unwrap();
    let left = store.get(&file("race")).await.unwrap();
    assert!(left == a || left == b);
}

#[tokio::test]
async fn files_behave() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file:{}", dir.path().display());
    behaves(storage::open(&url, &S3Settings::default()).await.unwrap()).await;
    let partial = |path: &std::path::Path| path.to_string_lossy().contains("partial");
    let left: Vec<_> = std::fs::read_dir(dir.path().join("files")).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(!left.iter().any(|path| partial(path)), "{left:?}");
}

#[tokio::test]
async fn s3_behaves() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(BUCKET)).unwrap();
    let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(dir.path()).unwrap());
    service.set_auth(SimpleAuth::from_single("id", "secret"));
    let service = service.build();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
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
    let settings = S3Settings {
        endpoint: Some(endpoint),
        region: Some("us-east-1".to_owned()),
        credentials: Some(("id".to_owned(), "secret".to_owned())),
    };
    behaves(Arc::new(S3Store::connect(BUCKET, "a/prefix", &settings).await.unwrap())).await;
    let stranger = S3Settings { credentials: Some(("id".to_owned(), "wrong".to_owned())), ..settings };
    let store = S3Store::connect(BUCKET, "a/prefix", &stranger).await.unwrap();
    let error = store.get(&file("race")).await.unwrap_err();
    assert!(matches!(error, StorageError::Unavailable(_)), "{error}");
}
