//! A base with an adapter merged into its weights: the files of a Hugging Face directory in F32, or a GGUF file.
//!
//! A quantised base is merged as its dequantised copy: the adapter was trained against just those numbers, and merging
//! into the blocks would quantise the sum again (a GGUF file may ask for that). Where the adapter changes an end of a
//! tied model, embedding and output layer become two tensors and `tie_word_embeddings` false; else one of the two
//! changes would be lost.

use candle_core::Tensor;

use super::{AdapterFiles, MethodError, Named, file, merge};
use crate::{
    domain::Site,
    model::{
        Base,
        gguf::{Outtype, Writer},
    },
};

/// `(name, bytes)` of each file of a directory.
pub fn directory(files: &AdapterFiles, base: &Base) -> Result<Vec<(String, Vec<u8>)>, MethodError> {
    let mut named: Vec<Named> = Vec::new();
    let tied = each(files, base, |name, tensor| {
        named.push((name, tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1::<f32>()?));
        Ok(())
    })?;
    let config = base.dense_config(tied).map_err(MethodError::Unsupported)?;
    let config = serde_json::to_vec_pretty(&config).unwrap_or_default();
    Ok(vec![("config.json".to_owned(), config), ("model.safetensors".to_owned(), file::tensor_bytes(&named))])
}

/// A file like the base's own, with its tokenizer and all else that it says.
pub fn gguf(files: &AdapterFiles, base: &Base, outtype: Outtype) -> Result<Vec<u8>, MethodError> {
    let mut writer = Writer::new(base, outtype).map_err(MethodError::Unsupported)?;
    each(files, base, |name, tensor| Ok(writer.push(&name, &tensor)?))?;
    Ok(writer.finish()?)
}

/// Gives every merged tensor by its Hugging Face name, one at a time, and says whether the ends are one still, as they
/// were or as one other tensor: the output layer, which comes last, is then left out.
fn each(
    files: &AdapterFiles,
    base: &Base,
    mut f: impl FnMut(String, Tensor) -> Result<(), MethodError>,
) -> Result<bool, MethodError> {
    let change = merge(files, base)?;
    let [embed, head] = [Site::Embed, Site::Head].map(|end| format!("{}.weight", end.module()));
    let (mut tied, mut embedding) = (base.info.tied, None);
    base.dense_tensors(|name, weight| {
        let changed = change.tensor(&name, &weight)?;
        let id = changed.as_ref().map(Tensor::id);
        if name == embed {
            embedding = id;
        }
        if name == head {
            tied &= id == embedding;
            if tied {
                return Ok(());
            }
        }
        let tensor = changed.unwrap_or(weight);
        let sum = tensor.sum_all()?.to_scalar::<f32>()?;
        if !sum.is_finite() && tensor.flatten_all()?.to_vec1::<f32>()?.iter().any(|value| !value.is_finite()) {
            return Err(MethodError::Mismatch(format!("{name} is not finite once merged")));
        }
        f(name, tensor)
    })?;
    Ok(tied)
}
