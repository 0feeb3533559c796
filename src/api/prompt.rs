//! Inputs as text or token ids, one or many.

use serde::Deserialize;

use crate::service::{Problem, catalogue::Model};

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    ManyIds(Vec<Vec<u32>>),
}

impl Prompt {
    /// Ids of each, at least one and at most `most`; `param` is the field that it came in.
    pub fn ids(&self, model: &Model, param: &str, most: usize) -> Result<Vec<Vec<u32>>, Problem> {
        let tokenizer = &model.resident.text.tokenizer;
        let ids = |text: &String| -> Result<Vec<u32>, Problem> {
            let ids = tokenizer.encode(text, true)?;
            Ok(tokenizer.bos.into_iter().filter(|bos| ids.first() != Some(bos)).chain(ids.iter().copied()).collect())
        };
        let all = match self {
            Prompt::Text(text) => vec![ids(text)?],
            Prompt::Texts(texts) => texts.iter().take(most + 1).map(ids).collect::<Result<_, _>>()?,
            Prompt::Ids(ids) => vec![ids.clone()],
            Prompt::ManyIds(many) => many.iter().take(most + 1).cloned().collect(),
        };
        if all.is_empty() || all.len() > most {
            let message = format!("{param} has none or more than {most} of them");
            return Err(Problem::invalid(param, "out_of_range", message));
        }
        Ok(all)
    }
}
