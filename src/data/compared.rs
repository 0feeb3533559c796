//! Prompts and pairs as judges read them, and the rows that come of their answers.

use std::io::BufRead;

use serde_json::{Map, Value, json};

use super::{Answer, DataError, Fault, Preference, Record, validate::each_row};

/// A row of a file of prompts or of pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    /// From 1.
    pub line: u64,
    /// The conversation up to the answers.
    pub messages: Vec<Value>,
    /// The answers that the row brings.
    pub answers: Option<[Side; 2]>,
    /// For graders: the row, or the pair's conversation as one.
    pub item: Value,
    input: Input,
}

/// How the row says what is answered.
#[derive(Clone, Debug, PartialEq)]
enum Input {
    Text(String),
    Chat(Map<String, Value>),
}

/// One of two answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Side {
    Text(String),
    Messages(Vec<Value>),
}

impl Side {
    /// What a model has said.
    pub fn said(text: String) -> Self {
        Side::Messages(vec![json!({"role": "assistant", "content": text})])
    }

    /// The texts of its messages.
    pub fn text(&self) -> String {
        match self {
            Side::Text(text) => text.clone(),
            Side::Messages(messages) => {
                let texts: Vec<&str> = messages.iter().filter_map(|message| message["content"].as_str()).collect();
                texts.join("\n")
            }
        }
    }

    fn json(&self) -> Value {
        match self {
            Side::Text(text) => json!(text),
            Side::Messages(messages) => json!(messages),
        }
    }
}

impl Compared {
    /// A row of a dataset of pairs. `probability` is that of the first being better.
    pub fn row(&self, better: &Side, worse: &Side, probability: f64, judgement: &Value) -> Value {
        let (better, worse) = (better.json(), worse.json());
        match &self.input {
            Input::Text(prompt) => json!({"prompt": prompt, "chosen": better, "rejected": worse,
                                          "probability": probability, "judgement": judgement}),
            Input::Chat(input) => json!({"input": input, "preferred_output": better, "non_preferred_output": worse,
                                         "probability": probability, "judgement": judgement}),
        }
    }
}

/// Every row of a file of prompts or pairs. The first that is neither is an error.
pub fn compared(reader: impl BufRead) -> Result<Vec<Compared>, DataError> {
    let mut all = Vec::new();
    each_row(reader, |line, row| {
        let row = row.and_then(|(_, record)| of_record(line, record));
        all.push(row.map_err(|fault| DataError::Line(fault.at(line)))?);
        Ok(())
    })?;
    if all.is_empty() { Err(DataError::Empty) } else { Ok(all) }
}

fn of_record(line: u64, record: Record) -> Result<Compared, Fault> {
    match record {
        Record::Question(question) if question.tools.is_some() => {
            Err(Fault::new("unsupported_tools", "prompts with tools cannot be answered here"))
        }
        Record::Question(question) => {
            let input = Input::Chat(object("messages", json!(question.messages)));
            Ok(Compared { line, messages: question.messages, answers: None, item: question.item, input })
        }
        Record::Preference(pair) => of_pair(line, pair),
        _ => Err(Fault::new("wrong_format", "the row is neither a prompt nor a pair")),
    }
}

fn of_pair(line: u64, pair: Preference) -> Result<Compared, Fault> {
    match (pair.chosen, pair.rejected) {
        (Answer::Completion(chosen), Answer::Completion(rejected)) => {
            let messages = vec![json!({"role": "user", "content": chosen.prompt})];
            let item = json!({"messages": messages, "prompt": chosen.prompt});
            let answers = Some([Side::Text(chosen.completion), Side::Text(rejected.completion)]);
            Ok(Compared { line, messages, answers, item, input: Input::Text(chosen.prompt) })
        }
        (Answer::Chat(mut chosen), Answer::Chat(mut rejected)) => {
            // The last message is an answer in any case.
            let most = chosen.messages.len().min(rejected.messages.len()).saturating_sub(1);
            let shared = chosen.messages.iter().zip(&rejected.messages).take(most).take_while(|(a, b)| a == b).count();
            let messages: Vec<Value> = chosen.messages.drain(..shared).collect();
            rejected.messages.drain(..shared);
            let mut input = object("messages", json!(messages));
            if let Some(tools) = chosen.tools {
                input.insert("tools".to_owned(), json!(tools));
            }
            let answers = Some([Side::Messages(chosen.messages), Side::Messages(rejected.messages)]);
            Ok(Compared { line, item: json!({"messages": messages}), messages, answers, input: Input::Chat(input) })
        }
        _ => Err(Fault::new("wrong_format", "the two answers are of different kinds")),
    }
}

fn object(key: &str, value: Value) -> Map<String, Value> {
    [(key.to_owned(), value)].into_iter().collect()
}
