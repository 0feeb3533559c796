//! Text and token ids: the tokenizer, the chat template, and text out of a stream of ids.

mod detokenizer;
mod directory;
mod grammar;
mod pre;
mod sentencepiece;
mod template;
mod tokenizer;
mod tools;
mod vocabulary;

use std::{path::Path, sync::OnceLock};

pub use detokenizer::Detokenizer;
pub use grammar::{Grammar, Grammars};
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
pub use tools::{Calls, Said, ToolReader, ToolStyle};

use crate::formats::{FormatError, gguf::Gguf};

#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("{0}")]
    Tokenizer(String),
    /// The base's chat template refused these messages, or ran past its limits.
    #[error("{0}")]
    Template(String),
    /// A schema that no text can be held to, or a text that left its grammar.
    #[error("{0}")]
    Grammar(String),
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
    /// Made when first asked for.
    grammars: OnceLock<Grammars>,
}

impl Text {
    /// From a GGUF's metadata.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_gguf(gguf)?;
        let token = |key: &str| {
            let tokens = gguf.array("tokenizer.ggml.tokens")?;
            tokens.get(usize::try_from(gguf.u64(key)?).ok()?)?.as_str()
        };
        let bos = token("tokenizer.ggml.bos_token_id").unwrap_or_default();
        let eos = token("tokenizer.ggml.eos_token_id").unwrap_or_default();
        let source = gguf.str("tokenizer.chat_template");
        let template = source.map(|source| ChatTemplate::new(source, bos, eos)).transpose()?;
        let eot = gguf.u64("tokenizer.ggml.eot_token_id").and_then(|id| u32::try_from(id).ok());
        let stop_ids = stop_ids(&tokenizer, eot.into_iter().collect());
        Ok(Text { tokenizer, template, stop_ids, grammars: OnceLock::new() })
    }

    /// From a Hugging Face directory: tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json.
    pub fn from_dir(dir: &Path) -> Result<Self, TextError> {
        directory::text(dir)
    }

    /// What holds texts to schemas.
    pub fn grammars(&self) -> Result<&Grammars, TextError> {
        if self.grammars.get().is_none() {
            let made = Grammars::new(&self.tokenizer, &self.stop_ids)?;
            // Whoever was first has made the same.
            _ = self.grammars.set(made);
        }
        self.grammars.get().ok_or_else(|| TextError::Grammar("no grammars".to_owned()))
    }

    /// By what the path is.
    pub fn open(path: &Path) -> Result<Self, TextError> {
        if path.is_dir() { Self::from_dir(path) } else { Self::from_gguf(&Gguf::open(path)?) }
    }
}

/// The tokenizer's eos, then what else the files name, then the ends of turns that models are known to write
/// though their files do not say so.
fn stop_ids(tokenizer: &Tokenizer, named: Vec<u32>) -> Vec<u32> {
    let turn_ends = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"];
    let known = turn_ends.into_iter().filter_map(|token| tokenizer.id(token)).filter(|id| tokenizer.is_special(*id));
    let mut ids = Vec::new();
    for id in tokenizer.eos.into_iter().chain(named).chain(known) {
        if (id as usize) < tokenizer.vocab_size && !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}
