//! Which tokens may follow, so that a text keeps to a JSON schema: llguidance over the base's own vocabulary.

use std::sync::Arc;

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use super::{Calls, TextError, Tokenizer, ToolStyle};

/// Compiles grammars for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
    ends: Arc<[u32]>,
}

impl Grammars {
    /// `ends` are the tokens that end a text.
    pub fn new(tokenizer: &Tokenizer, ends: &[u32]) -> Result<Self, TextError> {
        // Special tokens are no text: the marker keeps them out of strings.
        let word = |id: u32| match tokenizer.is_special(id) {
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], tokenizer.token_bytes(id).as_slice()].concat(),
            false => tokenizer.token_bytes(id),
        };
        let n = u32::try_from(tokenizer.vocab_size).map_err(|_| refused("the vocabulary is too large"))?;
        let mut words: Vec<Vec<u8>> = (0..n).map(word).collect();
        // The parser wants an end of its own; it stands for all of `ends`.
        words.push([&[TokTrie::SPECIAL_TOKEN_MARKER][..], b"end"].concat());
        let trie = TokTrie::from(&TokRxInfo::new(n + 1, n), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &[]).map_err(refused)?;
        factory.quiet();
        Ok(Self { factory, ends: ends.into() })
    }

    /// Texts that are JSON of this schema, with Python's separators. What it cannot hold a text to is an error.
    pub fn json(&self, schema: &Value) -> Result<Grammar, TextError> {
        self.compile(TopLevelGrammar::from_json_schema(python_style(schema)?))
    }

    /// Texts with so many calls of functions, each with its name and the schema of its arguments.
    pub fn calls(&self, style: ToolStyle, calls: Calls, functions: &[(String, Value)]) -> Result<Grammar, TextError> {
        let styled = functions.iter().map(|(name, schema)| Ok((name.clone(), python_style(schema)?)));
        let styled: Vec<_> = styled.collect::<Result<_, TextError>>()?;
        self.compile(TopLevelGrammar::from_lark(style.lark(calls, &styled)))
    }

    fn compile(&self, grammar: TopLevelGrammar) -> Result<Grammar, TextError> {
        let mut matcher = Matcher::new(self.factory.create_parser(grammar));
        match matcher.get_error() {
            Some(error) => Err(refused(error)),
            None => {
                matcher.compute_mask().map_err(refused)?;
                Ok(Grammar { matcher, ends: self.ends.clone() })
            }
        }
    }
}

fn python_style(schema: &Value) -> Result<Value, TextError> {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        Value::Object(_) => schema.clone(),
        _ => return Err(refused("a schema is an object")),
    };
    if schema.get("x-guidance").is_some() {
        return Err(refused("x-guidance is no keyword of JSON schemas"));
    }
    schema["x-guidance"] = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
    Ok(schema)
}

fn refused(why: impl std::fmt::Display) -> TextError {
    let why = why.to_string();
    TextError::Grammar(why.lines().next().unwrap_or_default().to_owned())
}

/// Where a text stands in its grammar.
pub struct Grammar {
    matcher: Matcher,
    ends: Arc<[u32]>,
}

impl Grammar {
    /// Leaves only tokens that may follow: the score of every other becomes −∞.
    pub fn mask(&mut self, scores: &mut [f32]) -> Result<(), TextError> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(refused)?;
        let may_end = self.matcher.is_accepting().map_err(refused)? || self.matcher.is_stopped();
        let keeps = |id: u32| match self.ends.contains(&id) {
            true => may_end,
            false => (id as usize) < allowed.len() - 1 && contains(&allowed, id),
        };
        let mut left = 0;
        for (id, score) in (0u32..).zip(scores.iter_mut()) {
            if keeps(id) {
                left += 1;
            } else {
                *score = f32::NEG_INFINITY;
            }
        }
        if left == 0 { Err(refused("no token of the vocabulary can follow")) } else { Ok(()) }
    }

    /// The text goes on with this token.
    pub fn take(&mut self, id: u32) -> Result<(), TextError> {
        self.matcher.consume_token(id).map_err(refused)
    }

    /// Nothing can follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

fn contains(allowed: &SimpleVob, id: u32) -> bool {
    allowed.get(id as usize)
}

impl Clone for Grammar {
    fn clone(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), ends: self.ends.clone() }
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}
