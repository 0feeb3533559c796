//! Adapters in the store: files first, read back and compared, the manifest last. Nothing points at a generation
//! before all of it is there.

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    domain::{BaseInfo, Manifest, ManifestFile},
    inference::{ArtifactError, CONFIG, MANIFEST, WEIGHTS, generation_of, listed, sha256},
    methods::AdapterFiles,
    storage::{BlobStore, Key},
};

/// Writes one blob and reads it back.
pub(super) async fn put_checked(
    store: &Arc<dyn BlobStore>,
    key: &Key,
    bytes: Bytes,
) -> Result<ManifestFile, ArtifactError> {
    let (sha256, length) = (sha256(&bytes), bytes.len() as u64);
    store.put(key, bytes).await?;
    if crate::inference::sha256(&store.get(key).await?) != sha256 {
        return Err(ArtifactError::Damaged(key.to_string()));
    }
    let name = key.to_string().rsplit('/').next().unwrap_or_default().to_owned();
    Ok(ManifestFile { name, bytes: length, sha256 })
}

/// Puts an adapter under its generation. Publishing the same adapter again changes nothing.
pub async fn publish_adapter(
    store: &Arc<dyn BlobStore>,
    files: &AdapterFiles,
    base: &BaseInfo,
    method: &str,
) -> Result<Manifest, ArtifactError> {
    let parts = [(CONFIG, &files.config), (WEIGHTS, &files.weights)];
    let listed = listed(files);
    let generation = generation_of(&listed);
    for (name, bytes) in parts {
        put_checked(
            store,
            &Key::Adapter { generation: generation.clone(), name: name.to_owned() },
            bytes.clone().into(),
        )
        .await?;
    }
    let manifest = Manifest {
        generation: generation.clone(),
        base_id: base.id.clone(),
        base_hash: base.hash.clone(),
        method: method.to_owned(),
        files: listed,
    };
    let bytes = serde_json::to_vec_pretty(&manifest).map_err(|e| ArtifactError::Damaged(e.to_string()))?;
    put_checked(store, &Key::Adapter { generation, name: MANIFEST.to_owned() }, bytes.into()).await?;
    Ok(manifest)
}
