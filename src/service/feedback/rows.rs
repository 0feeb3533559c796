//! Feedback as rows of a dataset.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

use crate::{
    domain::{Feedback, ObjectiveSpec, StoredCompletion, dataset::RowKind, feedback::Judgement},
    service::{Problem, fields::in_range},
};

/// What the rows are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// Good answers as conversations.
    Sft,
    /// Pairs: OpenAI's `input`, `preferred_output`, `non_preferred_output`.
    Preference,
    /// Single answers with a label: TRL's `prompt`, `completion`, `label`.
    Kto,
}

impl RowFormat {
    pub const ALL: [RowFormat; 3] = [RowFormat::Sft, RowFormat::Preference, RowFormat::Kto];

    pub fn name(self) -> &'static str {
        match self {
            RowFormat::Sft => "sft",
            RowFormat::Preference => "preference",
            RowFormat::Kto => "kto",
        }
    }

    pub fn named(name: &str) -> Result<Self, Problem> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Problem::invalid("format", "out_of_range", format!("format {name:?} is not one of {names}"))
        })
    }

    /// What an objective trains on.
    pub fn of(objective: &ObjectiveSpec) -> Result<Self, Problem> {
        match objective.rows() {
            RowKind::Examples => Ok(RowFormat::Sft),
            RowKind::Pairs => Ok(RowFormat::Preference),
            RowKind::Judged => Ok(RowFormat::Kto),
            RowKind::Prompts => {
                let name = objective.type_name();
                let message =
                    format!("{name} learns from its grader, not from feedback: name a training_file of prompts");
                Err(Problem::invalid("feedback", "unsupported_parameter", message))
            }
            RowKind::Labelled | RowKind::Tagged => {
                let name = objective.type_name();
                let message = format!("nobody says in feedback what texts are called: {name} needs a training_file");
                Err(Problem::invalid("feedback", "unsupported_parameter", message))
            }
        }
    }
}

/// Which ratings are good and which are bad; those between say nothing.
#[derive(Clone, Copy, Debug)]
pub struct Thresholds {
    good: u8,
    bad: u8,
}

impl Thresholds {
    /// By default 4 and 5 are good, 1 and 2 bad.
    pub fn new(min_rating: Option<u8>, max_rating: Option<u8>) -> Result<Self, Problem> {
        let good = in_range("min_rating", min_rating.unwrap_or(4), 1, 5)?;
        let bad = in_range("max_rating", max_rating.unwrap_or(good.min(3) - 1), 0, good - 1)?;
        Ok(Self { good, bad })
    }

    fn label(self, judgement: &Judgement) -> Option<bool> {
        match judgement {
            Judgement::Thumb { up } => Some(*up),
            Judgement::Rating { value } if *value >= self.good => Some(true),
            Judgement::Rating { value } if *value <= self.bad => Some(false),
            _ => None,
        }
    }
}

pub struct Made {
    pub rows: Vec<Value>,
    pub unused: usize,
}

/// The completions that a feedback speaks of.
pub fn completions_of(said: &Feedback) -> impl Iterator<Item = &str> {
    let other = match &said.judgement {
        Judgement::Preference { over_completion, .. } => Some(over_completion.as_str()),
        _ => None,
    };
    [said.completion_id.as_str()].into_iter().chain(other)
}

/// An answer that is good or bad by itself.
struct Labelled<'a> {
    messages: &'a [Value],
    text: &'a str,
    is_good: bool,
}

/// Two answers to one conversation.
struct Pair<'a> {
    messages: &'a [Value],
    better: &'a str,
    worse: &'a str,
}

/// Rows in the order of the feedback. What contradicts itself (the same answer called good and bad) is kept as it was
/// said: objectives for noisy labels exist.
pub fn make(
    format: RowFormat,
    said: &[Feedback],
    completions: &HashMap<String, StoredCompletion>,
    thresholds: Thresholds,
) -> Made {
    let mut rows = Vec::new();
    let mut used = vec![false; said.len()];
    let mut single = Vec::new();
    for (i, one) in said.iter().enumerate() {
        let Some(about) = completions.get(&one.completion_id) else { continue };
        let Some(text) = about.choices.get(one.choice).map(String::as_str) else { continue };
        let messages = about.messages.as_slice();
        let pair = match &one.judgement {
            Judgement::Correction { text: better } => Some(Pair { messages, better, worse: text }),
            Judgement::Preference { over_completion, over_choice } => completions
                .get(over_completion)
                .and_then(|other| other.choices.get(*over_choice))
                .map(|worse| Pair { messages, better: text, worse }),
            _ => None,
        };
        match (pair, thresholds.label(&one.judgement)) {
            (Some(pair), _) => {
                rows.extend(of_pair(format, &pair));
                used[i] = true;
            }
            (None, Some(is_good)) => single.push((i, Labelled { messages, text, is_good })),
            (None, None) => {}
        }
    }
    match format {
        RowFormat::Preference => rows.extend(matched(&single, &mut used)),
        format => {
            for (i, labelled) in &single {
                if let Some(row) = of_single(format, labelled) {
                    rows.push(row);
                    used[*i] = true;
                }
            }
        }
    }
    Made { rows, unused: used.iter().filter(|used| !**used).count() }
}

fn answer(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

fn with_answer(messages: &[Value], text: &str) -> Vec<Value> {
    messages.iter().cloned().chain([answer(text)]).collect()
}

fn of_pair(format: RowFormat, pair: &Pair) -> Vec<Value> {
    let Pair { messages, better, worse } = *pair;
    match format {
        RowFormat::Sft => vec![json!({"messages": with_answer(messages, better)})],
        RowFormat::Preference => vec![json!({
            "input": {"messages": messages},
            "preferred_output": [answer(better)],
            "non_preferred_output": [answer(worse)],
        })],
        RowFormat::Kto => vec![labelled(messages, better, true), labelled(messages, worse, false)],
    }
}

fn of_single(format: RowFormat, one: &Labelled) -> Option<Value> {
    match format {
        RowFormat::Sft => one.is_good.then(|| json!({"messages": with_answer(one.messages, one.text)})),
        RowFormat::Kto => Some(labelled(one.messages, one.text, one.is_good)),
        RowFormat::Preference => None,
    }
}

fn labelled(messages: &[Value], text: &str, is_good: bool) -> Value {
    json!({"prompt": messages, "completion": [answer(text)], "label": is_good})
}

/// Pairs of a good and a bad answer to the same conversation, first with first; each answer is used once.
fn matched(single: &[(usize, Labelled)], used: &mut [bool]) -> Vec<Value> {
    let mut by_conversation: BTreeMap<String, Vec<&(usize, Labelled)>> = BTreeMap::new();
    for one in single {
        by_conversation.entry(Value::from(one.1.messages.to_vec()).to_string()).or_default().push(one);
    }
    let mut pairs = Vec::new();
    for answers in by_conversation.into_values() {
        let (good, bad): (Vec<_>, Vec<_>) = answers.into_iter().partition(|(_, one)| one.is_good);
        for ((g, good), (b, bad)) in good.into_iter().zip(bad) {
            if good.text == bad.text {
                continue;
            }
            used[*g] = true;
            used[*b] = true;
            pairs.push((*g.min(b), Pair { messages: good.messages, better: good.text, worse: bad.text }));
        }
    }
    pairs.sort_by_key(|(place, _)| *place);
    pairs.iter().flat_map(|(_, pair)| of_pair(RowFormat::Preference, pair)).collect()
}
