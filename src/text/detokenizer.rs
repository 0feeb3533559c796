//! Text out of a stream of ids, never half a character.

use super::{TextError, Tokenizer};

/// The state of one stream.
#[derive(Debug, Default)]
pub struct Detokenizer {}

impl Detokenizer {
    /// The text that became certain with this id; empty while a character is incomplete.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TextError> {
        let _ = (tokenizer, id);
        todo!("text helper")
    }

    /// What is left at the end; incomplete bytes become U+FFFD.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, TextError> {
        let _ = tokenizer;
        todo!("text helper")
    }
}
