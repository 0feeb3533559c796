//! Token ids for text, as the base's own tokenizer makes them.

use std::{ops::Range, sync::OnceLock};

use tokenizers::{AddedToken, Tokenizer as Pipeline};

use super::{
    TextError, pre, sentencepiece,
    vocabulary::{Spelling, Token, Vocabulary},
};
use crate::formats::gguf::{Gguf, Value};

/// GGUF's token types.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;

pub struct Tokenizer {
    /// Put before every prompt if the base's tokenizer says so.
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub vocab_size: usize,
    pipeline: Pipeline,
    /// The same, taking special tokens in a text for plain text; made when first asked for.
    plain: OnceLock<Pipeline>,
    vocabulary: Vocabulary,
}

impl Tokenizer {
    /// From the metadata of a GGUF file.
    pub(super) fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
        let types = gguf.array("tokenizer.ggml.token_type").unwrap_or_default();
        let type_of = |id: usize| types.get(id).and_then(Value::as_u64).unwrap_or(1);
        let is_special = |id: usize| matches!(type_of(id), UNKNOWN | CONTROL);
        let (mut pipeline, spelling, adds_bos) = match gguf.str("tokenizer.ggml.model").unwrap_or("missing") {
            "gpt2" => {
                let family = pre::family(gguf.str("tokenizer.ggml.pre").unwrap_or("default"))?;
                let merges = strings(gguf, "tokenizer.ggml.merges")?;
                (bpe(&tokens, &merges, &family)?, Spelling::ByteLevel, family.add_bos)
            }
            "llama" => {
                let values = gguf.array("tokenizer.ggml.scores").unwrap_or_default();
                let scores: Vec<f32> = values.iter().map(|value| value.as_f64().unwrap_or(f64::MIN) as f32).collect();
                let is_piece = |id: usize| !is_special(id) && type_of(id) != BYTE;
                let unknown = (0..tokens.len()).find(|id| type_of(*id) == UNKNOWN).map(|id| tokens[id]);
                let space_prefix = gguf.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
                let pipeline = sentencepiece::pipeline(&tokens, &scores, is_piece, unknown, space_prefix)?;
                (pipeline, Spelling::SentencePiece, true)
            }
            other => {
                let message = format!("the tokenizer model {other} of this gguf file is not supported");
                return Err(TextError::Tokenizer(message));
            }
        };
        let added = |wanted: fn(u64) -> bool, is_special| {
            let ids = (0..tokens.len()).filter(move |id| wanted(type_of(*id)));
            ids.map(|id| AddedToken::from(tokens[id], is_special).normalized(false)).collect::<Vec<_>>()
        };
        pipeline.add_special_tokens(added(|t| matches!(t, UNKNOWN | CONTROL), true)).map_err(failed)?;
        pipeline.add_tokens(added(|t| t == USER_DEFINED, false)).map_err(failed)?;
        let listed = tokens.iter().enumerate().map(|(id, text)| {
            let is_added = is_special(id) || type_of(id) == USER_DEFINED;
            Token { text, is_added, is_special: is_special(id) }
        });
        let vocabulary = Vocabulary::new(spelling, listed);
        let id_at = |key: &str| {
            let id = gguf.u64(key).and_then(|id| u32::try_from(id).ok());
            id.filter(|id| (*id as usize) < tokens.len())
        };
        let add_bos = gguf.bool("tokenizer.ggml.add_bos_token").unwrap_or(adds_bos);
        let bos = id_at("tokenizer.ggml.bos_token_id").filter(|_| add_bos);
        let eos = id_at("tokenizer.ggml.eos_token_id");
        Ok(Tokenizer { bos, eos, vocab_size: vocabulary.len(), pipeline, plain: OnceLock::new(), vocabulary })
    }

    /// From the bytes of a tokenizer.json. BOS and EOS are set by who knows the other files.
    pub(super) fn from_json(json: &[u8]) -> Result<Self, TextError> {
        let pipeline = Pipeline::from_bytes(json).map_err(failed)?;
        let decoder = serde_json::to_string(&pipeline.get_decoder()).unwrap_or_default();
        let spelling = if decoder.contains("ByteLevel") {
            Spelling::ByteLevel
        } else if decoder.contains('▁') {
            Spelling::SentencePiece
        } else {
            let message = "tokenizer.json: only byte-level and SentencePiece decoders are supported";
            return Err(TextError::Tokenizer(message.to_owned()));
        };
        let added = pipeline.get_added_tokens_decoder();
        let len = pipeline.get_vocab(true).into_values().max().map_or(0, |id| id + 1);
        let texts: Vec<String> = (0..len).map(|id| pipeline.id_to_token(id).unwrap_or_default()).collect();
        let listed = (0..len).zip(&texts).map(|(id, text)| {
            let token = added.get(&id);
            Token { text, is_added: token.is_some(), is_special: token.is_some_and(|t| t.special) }
        });
        let vocabulary = Vocabulary::new(spelling, listed);
        let vocab_size = vocabulary.len();
        Ok(Tokenizer { bos: None, eos: None, vocab_size, pipeline, plain: OnceLock::new(), vocabulary })
    }

    /// The first id that the tokenizer's own post-processor puts before a text.
    pub(super) fn own_prefix(&self) -> Result<Option<u32>, TextError> {
        Ok(self.pipeline.encode_fast("", true).map_err(failed)?.get_ids().first().copied())
    }

    /// Ids of `text`. Special tokens written out in the text become their ids when `parse_special`.
    /// No BOS or EOS is added.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, TextError> {
        let pipeline = if parse_special { &self.pipeline } else { self.plain() };
        Ok(pipeline.encode_fast(text, false).map_err(failed)?.get_ids().to_vec())
    }

    /// Ids of `text`, special tokens in it included, each with the bytes of the text that it stands for.
    pub fn encode_spans(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, TextError> {
        let encoded = self.pipeline.encode(text, false).map_err(failed)?;
        Ok(encoded.get_ids().iter().zip(encoded.get_offsets()).map(|(id, (start, end))| (*id, *start..*end)).collect())
    }

    fn plain(&self) -> &Pipeline {
        self.plain.get_or_init(|| {
            let mut plain = self.pipeline.clone();
            plain.set_encode_special_tokens(true);
            plain
        })
    }

    /// Text of ids; special tokens are left out when `skip_special`. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.shown_bytes(id, skip_special)?);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// What an id adds to a text.
    pub(super) fn shown_bytes(&self, id: u32, skip_special: bool) -> Result<&[u8], TextError> {
        if id as usize >= self.vocab_size {
            let n = self.vocab_size;
            return Err(TextError::Tokenizer(format!("token {id} is outside the vocabulary of {n}")));
        }
        Ok(if skip_special && self.is_special(id) { &[] } else { self.vocabulary.bytes(id) })
    }

    /// The bytes of one token (not always whole characters), as `logprobs` show them.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.vocabulary.bytes(id).to_vec()
    }

    /// Whether a token is a control token, such as the end of a turn.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.is_special(id)
    }

    /// The id of a token as the vocabulary writes it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.pipeline.token_to_id(token)
    }
}

fn bpe(tokens: &[&str], merges: &[&str], family: &pre::Family) -> Result<Pipeline, TextError> {
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(TextError::Tokenizer(format!("the merge {merge:?} is not a pair of tokens")));
        };
        pairs.push((left.to_owned(), right.to_owned()));
    }
    let vocab =
        tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id)).collect::<tokenizers::models::bpe::Vocab>();
    let model = tokenizers::models::bpe::BpeBuilder::new()
        .vocab_and_merges(vocab, pairs)
        .ignore_merges(family.ignore_merges)
        .build()
        .map_err(failed)?;
    let mut pipeline = Pipeline::new(model);
    pipeline.with_pre_tokenizer(Some(family.pre_tokenizer()?));
    Ok(pipeline)
}

fn strings<'a>(gguf: &'a Gguf, key: &str) -> Result<Vec<&'a str>, TextError> {
    let values = gguf.array(key).and_then(|values| values.iter().map(Value::as_str).collect());
    values.ok_or_else(|| TextError::Tokenizer(format!("{key} is not an array of strings in this gguf file")))
}

fn failed(error: tokenizers::Error) -> TextError {
    TextError::Tokenizer(format!("tokenizer: {error}"))
}
