//! Token ids for text, as the base's own tokenizer makes them.

use super::TextError;

pub struct Tokenizer {
    /// Put before every prompt if the base's tokenizer says so.
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub vocab_size: usize,
}

impl Tokenizer {
    /// Ids of `text`. Special tokens written out in the text become their ids when `parse_special`.
    /// No BOS or EOS is added.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, TextError> {
        let _ = (text, parse_special);
        todo!("text helper")
    }

    /// Text of ids; special tokens are left out when `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        let _ = (ids, skip_special);
        todo!("text helper")
    }

    /// The bytes of one token (not always whole characters), as `logprobs` show them.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let _ = id;
        todo!("text helper")
    }

    pub fn is_special(&self, id: u32) -> bool {
        let _ = id;
        todo!("text helper")
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        let _ = token;
        todo!("text helper")
    }
}
