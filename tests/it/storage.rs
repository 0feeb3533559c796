//! One suite for every store: local files, and S3 spoken by an in-process server.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use attune::storage::{self, BlobStore, ByteStream, Key, S3Settings, S3Store, StorageError};
use bytes::Bytes;
use futures::{StreamExt, stream};

use crate::support::s3::{BUCKET, serve};

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

/// Nobody waits for an upload any more: it has begun when `begun` says so, and must leave nothing.
async fn is_dropped(store: Arc<dyn BlobStore>, begun: impl Fn() -> bool) {
    // Two parts of a multipart upload, and then silence.
    let body = pieces(17_000_000).1.chain(stream::pending()).boxed();
    let key = file("dropped");
    let mut upload = std::pin::pin!(store.put_stream(&key, body, u64::MAX));
    loop {
        tokio::select! {
            biased;
            ended = &mut upload => panic!("the stream never ends: {ended:?}"),
            () = tokio::time::sleep(std::time::Duration::from_millis(5)) => if begun() { return },
        }
    }
}

/// Every file below a folder.
fn all_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { all_files(&path) } else { vec![path] }).collect()
}

#[tokio::test]
async fn files_behave() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file:{}", dir.path().display());
    let open = async || storage::open(&url, &S3Settings::default()).await.unwrap();
    behaves(open().await).await;
    let partial = || -> Vec<PathBuf> {
        let all = all_files(dir.path());
        all.into_iter().filter(|path| path.to_string_lossy().ends_with(".partial")).collect()
    };
    assert_eq!(partial(), Vec::<PathBuf>::new());
    is_dropped(open().await, || !partial().is_empty()).await;
    assert_eq!(partial(), Vec::<PathBuf>::new(), "a dropped upload leaves nothing");

    // What a killed process left goes at the next start; what another process still writes to stays.
    let (old, fresh) = (dir.path().join("files/old.partial"), dir.path().join("files/fresh.partial"));
    for path in [&old, &fresh] {
        std::fs::write(path, "half").unwrap();
    }
    let age = std::time::SystemTime::now() - std::time::Duration::from_secs(2 * 3600);
    std::fs::File::options().write(true).open(&old).unwrap().set_modified(age).unwrap();
    let blobs = all_files(dir.path()).len();
    open().await;
    assert_eq!(partial(), [fresh]);
    assert_eq!(all_files(dir.path()).len(), blobs - 1);
}

#[tokio::test]
async fn s3_behaves() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("http://{}", serve(dir.path()).await);
    let settings = S3Settings {
        endpoint: Some(endpoint),
        region: Some("us-east-1".to_owned()),
        credentials: Some(("id".to_owned(), "secret".to_owned())),
    };
    let store = Arc::new(S3Store::connect(BUCKET, "a/prefix", &settings).await.unwrap());
    behaves(store.clone()).await;
    // The server keeps an upload that is neither complete nor aborted in files of this name.
    let has = |part: &str| all_files(dir.path()).iter().any(|path| path.to_string_lossy().contains(part));
    let uploads = || has(".upload");
    let none_left = async || {
        let start = std::time::Instant::now();
        while uploads() {
            assert!(start.elapsed().as_secs() < 20, "{:?}", all_files(dir.path()));
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    none_left().await;
    is_dropped(store.clone(), uploads).await;
    none_left().await;
    is_dropped(store, || has(".part-2")).await;
    none_left().await;
    let stranger = S3Settings { credentials: Some(("id".to_owned(), "wrong".to_owned())), ..settings };
    let store = S3Store::connect(BUCKET, "a/prefix", &stranger).await.unwrap();
    let error = store.get(&file("race")).await.unwrap_err();
    assert!(matches!(error, StorageError::Unavailable(_)), "{error}");
}
