//! Adapters in the store: nothing is loaded that is not what its generation says.

use std::sync::Arc;

use attune::{
    domain::Manifest,
    inference::{ArtifactError, read_adapter},
    jobs::publish_adapter,
    methods::AdapterFiles,
    storage::{BlobStore, Key, S3Settings, StorageError, open},
};

use crate::support::tiny::Tiny;

fn key(generation: &str, name: &str) -> Key {
    Key::Adapter { generation: generation.to_owned(), name: name.to_owned() }
}

async fn put(store: &Arc<dyn BlobStore>, generation: &str, name: &str, bytes: Vec<u8>) {
    store.put(&key(generation, name), bytes.into()).await.unwrap();
}

#[tokio::test]
async fn a_generation_is_what_its_name_says() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    Tiny::default().write(&model);
    let base = attune::model::Base::open("tiny", &model).unwrap().info.clone();
    let store = open(&format!("file:{}", dir.path().join("blobs").display()), &S3Settings::default()).await.unwrap();
    let files = |text: &str| AdapterFiles { config: b"{}".to_vec(), weights: text.as_bytes().to_vec() };
    let one = publish_adapter(&store, &files("one"), &base, "lora").await.unwrap();
    let two = publish_adapter(&store, &files("two"), &base, "lora").await.unwrap();
    assert_ne!(one.generation, two.generation);
    let (manifest, found) = read_adapter(&store, &one.generation).await.unwrap();
    assert_eq!((manifest, found.weights), (one.clone(), b"one".to_vec()));

    let damaged = async |what: &str| {
        let error = read_adapter(&store, &one.generation).await.err();
        assert!(matches!(error, Some(ArtifactError::Damaged(_))), "{what}: {error:?}");
    };
    let (g, weights) = (&one.generation, "adapter_model.safetensors");
    put(&store, g, weights, b"0ne".to_vec()).await;
    damaged("a flipped bit").await;
    put(&store, g, weights, b"on".to_vec()).await;
    damaged("a short file").await;
    // Another adapter, whole and with its own manifest, under this one's name.
    put(&store, g, weights, b"two".to_vec()).await;
    put(&store, g, "manifest.json", serde_json::to_vec(&two).unwrap()).await;
    damaged("another's manifest").await;
    let lying = Manifest { generation: g.clone(), ..two.clone() };
    put(&store, g, "manifest.json", serde_json::to_vec(&lying).unwrap()).await;
    damaged("another's files under this one's generation").await;
    put(&store, g, weights, b"one".to_vec()).await;
    let renamed = Manifest { generation: two.generation.clone(), ..one.clone() };
    put(&store, g, "manifest.json", serde_json::to_vec(&renamed).unwrap()).await;
    damaged("these files under another's generation").await;
    let empty = Manifest { files: Vec::new(), ..one.clone() };
    put(&store, g, "manifest.json", serde_json::to_vec(&empty).unwrap()).await;
    damaged("no files").await;
    put(&store, g, "manifest.json", b"{".to_vec()).await;
    damaged("half a manifest").await;
    store.delete(&key(g, "manifest.json")).await.unwrap();
    let gone = read_adapter(&store, g).await.err();
    assert!(matches!(gone, Some(ArtifactError::Storage(StorageError::NotFound(_)))), "{gone:?}");
    assert_eq!(read_adapter(&store, &two.generation).await.unwrap().1.weights, b"two");
}
