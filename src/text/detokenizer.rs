//! Text out of a stream of ids, never half a character.

use super::{TextError, Tokenizer};

/// The state of one stream. Special tokens are left out.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// The start of a character whose rest has not come.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// The text that became certain with this id; empty while a character is incomplete.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TextError> {
        self.pending.extend_from_slice(tokenizer.shown_bytes(id, true)?);
        let kept = incomplete_tail(&self.pending);
        let rest = self.pending.split_off(self.pending.len() - kept);
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending = rest;
        Ok(text)
    }

    /// What is left at the end; incomplete bytes become U+FFFD.
    pub fn finish(&mut self, _tokenizer: &Tokenizer) -> Result<String, TextError> {
        let pending = std::mem::take(&mut self.pending);
        Ok(String::from_utf8_lossy(&pending).into_owned())
    }
}

/// How many bytes at the end may still become a character with what follows.
fn incomplete_tail(bytes: &[u8]) -> usize {
    match bytes.utf8_chunks().last() {
        // A last chunk of invalid bytes at the very end is incomplete if some continuation would make it valid.
        Some(chunk) if is_start_of_char(chunk.invalid()) => chunk.invalid().len(),
        _ => 0,
    }
}

fn is_start_of_char(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
