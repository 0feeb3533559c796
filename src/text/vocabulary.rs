//! What each token is in bytes. Decoding goes through this table alone, so that a stream of tokens and all of them
//! at once cannot differ.

use std::collections::HashMap;

/// How a tokenizer writes bytes as letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, and `<0x0A>` is a byte.
    SentencePiece,
}

#[derive(Default)]
pub(super) struct Vocabulary {
    /// Of all tokens, one behind another.
    bytes: Vec<u8>,
    /// Where each token's end.
    ends: Vec<u32>,
    special: Vec<bool>,
}

/// A token's written form, and what kind it is.
pub(super) struct Token<'a> {
    pub(super) text: &'a str,
    /// Stands for itself and is not spelt: added tokens, special or not.
    pub(super) is_added: bool,
    pub(super) is_special: bool,
}

impl Vocabulary {
    pub(super) fn new<'a>(spelling: Spelling, tokens: impl Iterator<Item = Token<'a>>) -> Self {
        let letters = byte_of_letter();
        let mut vocabulary = Vocabulary::default();
        for token in tokens {
            vocabulary.bytes.extend(match (token.is_added, spelling) {
                (true, _) => token.text.as_bytes().to_vec(),
                (false, Spelling::ByteLevel) => byte_level(token.text, &letters),
                (false, Spelling::SentencePiece) => sentence_piece(token.text),
            });
            // No file's header is that long.
            vocabulary.ends.push(u32::try_from(vocabulary.bytes.len()).unwrap_or(u32::MAX));
            vocabulary.special.push(token.is_special);
        }
        vocabulary
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Nothing for an id outside the vocabulary.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let end = |id: usize| self.ends.get(id).map(|end| *end as usize);
        let start = if id == 0 { Some(0) } else { end(id as usize - 1) };
        start.zip(end(id as usize)).and_then(|(start, end)| self.bytes.get(start..end)).unwrap_or_default()
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

fn byte_level(text: &str, letters: &HashMap<char, u8>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match letters.get(&c) {
            Some(byte) => bytes.push(*byte),
            None => bytes.extend(c.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    bytes
}

fn sentence_piece(text: &str) -> Vec<u8> {
    let hex = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
    match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => text.replace('▁', " ").into_bytes(),
    }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes are counted up from U+0100.
fn byte_of_letter() -> HashMap<char, u8> {
    let is_printable = |b: &u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let (plain, moved): (Vec<u8>, Vec<u8>) = (0..=255).partition(is_printable);
    let moved = (0x100..).filter_map(char::from_u32).zip(moved);
    plain.into_iter().map(|b| (char::from(b), b)).chain(moved).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_has_its_own_bytes() {
        let token = |text| Token { text, is_added: false, is_special: false };
        let found = Vocabulary::new(Spelling::SentencePiece, ["▁a", "", "<0x0A>", "bc"].into_iter().map(token));
        let bytes: Vec<&[u8]> = [0, 1, 2, 3, 4, u32::MAX].map(|id| found.bytes(id)).to_vec();
        assert_eq!(bytes, [&b" a"[..], b"", b"\n", b"bc", b"", b""]);
        assert_eq!(found.len(), 4);
    }
}
