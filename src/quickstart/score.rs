//! The held-out questions of the sample task, and when an answer is right.

use anyhow::Context as _;
use serde_json::Value;

const HELD_OUT: &str = include_str!("../../samples/support_heldout.jsonl");
/// The samples' system message.
pub const SYSTEM: &str = "Northwind support desk.";

/// A question that the training rows do not have.
pub struct Question {
    /// Everything before the answer.
    pub messages: Vec<Value>,
    pub text: String,
    expected: Value,
}

impl Question {
    /// One JSON object with exactly the keys `category`, `priority` and `reply`, category and priority as expected.
    pub fn is_right(&self, answer: &str) -> bool {
        let Ok(Value::Object(answer)) = serde_json::from_str::<Value>(answer.trim()) else { return false };
        let has = |key: &str| answer.get(key).is_some_and(Value::is_string);
        let same = |key: &str| answer.get(key) == self.expected.get(key);
        answer.len() == 3 && has("reply") && same("category") && same("priority")
    }
}

pub fn held_out() -> anyhow::Result<Vec<Question>> {
    // Every third row: neighbours ask for the same kind of thing.
    let spread = (0..3).flat_map(|start| HELD_OUT.lines().skip(start).step_by(3));
    spread.map(question).collect::<Option<_>>().context("the held-out samples cannot be read")
}

fn question(line: &str) -> Option<Question> {
    let row: Value = serde_json::from_str(line).ok()?;
    let mut messages = row["messages"].as_array()?.clone();
    let expected = serde_json::from_str(messages.pop()?["content"].as_str()?).ok()?;
    let text = messages.last()?["content"].as_str()?.to_owned();
    Some(Question { messages, text, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_expected_shape_and_labels_count() {
        let questions = held_out().unwrap();
        assert_eq!(questions.len(), 30);
        let q = &questions[0];
        let answer = |category: &Value, rest: &str| {
            format!("{{\"category\":{category},\"priority\":{},{rest}}}", q.expected["priority"])
        };
        assert!(q.is_right(&answer(&q.expected["category"], "\"reply\":\"x\"")));
        assert!(!q.is_right(&answer(&"other".into(), "\"reply\":\"x\"")));
        assert!(!q.is_right(&answer(&q.expected["category"], "\"reply\":\"x\",\"more\":1")));
        assert!(!q.is_right("Sure! Here is the answer."));
    }
}
