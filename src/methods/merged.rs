//! A base with an adapter merged into its weights, as the files of a Hugging Face directory: config.json and
//! model.safetensors in F32.
//!
//! A quantised base is merged as its dequantised copy: the adapter was trained against just those numbers, and merging
//! into the blocks would quantise the sum again. Where the adapter changes an end of a tied model, embedding and output
//! layer become two tensors and `tie_word_embeddings` false; else one of the two changes would be lost.

use candle_core::Tensor;

use super::{AdapterFiles, MethodError, Named, file, merge};
use crate::{domain::Site, model::Base};

/// `(name, bytes)` of each file.
pub fn directory(files: &AdapterFiles, base: &Base) -> Result<Vec<(String, Vec<u8>)>, MethodError> {
    let change = merge(files, base)?;
    let mut ends = Vec::with_capacity(2);
    let mut named: Vec<Named> = Vec::new();
    let is_end = |name: &str| [Site::Embed, Site::Head].iter().any(|end| name == format!("{}.weight", end.module()));
    base.dense_tensors(|name, weight| {
        let changed = change.tensor(&name, &weight)?;
        if is_end(&name) {
            ends.push(changed.is_some());
        }
        let tensor: Tensor = changed.unwrap_or(weight);
        named.push((name, tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1::<f32>()?));
        Ok::<(), MethodError>(())
    })?;
    let tied = base.info.tied && !ends.contains(&true);
    if tied {
        named.pop(); // the output layer, which is the embedding
    }
    if let Some((name, ..)) = named.iter().find(|(_, _, values)| values.iter().any(|value| !value.is_finite())) {
        return Err(MethodError::Mismatch(format!("{name} is not finite once merged")));
    }
    let config = base.dense_config(tied).map_err(MethodError::Unsupported)?;
    let config = serde_json::to_vec_pretty(&config).unwrap_or_default();
    Ok(vec![("config.json".to_owned(), config), ("model.safetensors".to_owned(), file::tensor_bytes(&named))])
}
