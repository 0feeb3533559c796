//! Text and token ids: the tokenizer, the chat template, and text out of a stream of ids.

mod detokenizer;
mod template;
mod tokenizer;

use std::path::Path;

pub use detokenizer::Detokenizer;
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;

use crate::formats::{FormatError, gguf::Gguf};

#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("{0}")]
    Tokenizer(String),
    /// The base's chat template refused these messages, or ran past its limits.
    #[error("{0}")]
    Template(String),
    #[error("the base {0} has no chat template: use /v1/completions")]
    NoTemplate(String),
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// What a base says about text.
pub struct Text {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    /// Tokens that end a completion: the tokenizer's eos and eot.
    pub stop_ids: Vec<u32>,
}

impl Text {
    /// From a GGUF's metadata.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        let _ = gguf;
        todo!("text helper")
    }

    /// From a Hugging Face directory: tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json.
    pub fn from_dir(dir: &Path) -> Result<Self, TextError> {
        let _ = dir;
        todo!("text helper")
    }

    /// By what the path is.
    pub fn open(path: &Path) -> Result<Self, TextError> {
        if path.is_dir() { Self::from_dir(path) } else { Self::from_gguf(&Gguf::open(path)?) }
    }
}
