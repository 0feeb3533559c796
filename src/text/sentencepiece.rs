//! SentencePiece vocabularies of GGUF files (`tokenizer.ggml.model` is `llama`): pieces with scores.
//!
//! Neighbours whose joined text is a piece are joined, the best score first; what is no piece is written in bytes. A
//! BPE of the tokenizers crate does the same once each way to make a piece of two others is a merge, in the order of
//! the scores.

use std::collections::HashMap;

use tokenizers::{
    NormalizerWrapper, Tokenizer as Pipeline,
    models::bpe::{BpeBuilder, Vocab},
    normalizers::{Prepend, Replace, Sequence},
};

use super::TextError;

/// `is_piece` tells ordinary pieces from control and byte tokens. `space_prefix`: a text begins with a space.
pub(super) fn pipeline(
    tokens: &[&str],
    scores: &[f32],
    is_piece: impl Fn(usize) -> bool,
    unknown: Option<&str>,
    space_prefix: bool,
) -> Result<Pipeline, TextError> {
    if scores.len() != tokens.len() {
        let (scores, tokens) = (scores.len(), tokens.len());
        return Err(TextError::Tokenizer(format!("this gguf file has {scores} scores for {tokens} tokens")));
    }
    let ids: HashMap<&str, usize> = (0..tokens.len()).map(|id| (tokens[id], id)).collect();
    let mut merges: Vec<(f32, usize, usize)> = Vec::new();
    for id in (0..tokens.len()).filter(|id| is_piece(*id)) {
        let parts = tokens[id].char_indices().skip(1).map(|(at, _)| tokens[id].split_at(at));
        let known = parts.filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?)));
        let of_pieces = known.filter(|(left, right)| is_piece(*left) && is_piece(*right));
        merges.extend(of_pieces.map(|(left, right)| (scores[id], left, right)));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let merges = merges.into_iter().map(|(_, left, right)| (tokens[left].to_owned(), tokens[right].to_owned()));
    let vocab: Vocab = tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id)).collect();
    let mut model = BpeBuilder::new().vocab_and_merges(vocab, merges.collect()).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = unknown {
        model = model.unk_token(unknown.to_owned());
    }
    let failed = |error: tokenizers::Error| TextError::Tokenizer(format!("tokenizer: {error}"));
    let mut pipeline = Pipeline::new(model.build().map_err(failed)?);
    let spaces: NormalizerWrapper = Replace::new(" ", "▁").map_err(failed)?.into();
    let prefix = space_prefix.then(|| Prepend::new("▁".to_owned()).into());
    pipeline.with_normalizer(Some(Sequence::new(prefix.into_iter().chain([spaces]).collect()))).map_err(failed)?;
    Ok(pipeline)
}
