//! What a judge said, as a number. Anything else is an error in words.

use serde_json::Value;

/// Characters of an answer that an error shows.
const SHOWN: usize = 40;

/// A number, a JSON object with `result` or `score`, or one of them in the last line, maybe behind a colon.
pub fn number(text: &str, [least, greatest]: [f64; 2]) -> Result<f64, String> {
    let whole = text.trim();
    let last = whole.lines().last().unwrap_or_default();
    let behind = last.rsplit(':').next().unwrap_or_default();
    let found = [whole, last, behind].into_iter().find_map(read);
    let shown: String = whole.chars().take(SHOWN).collect();
    match found {
        Some(score) if (least..=greatest).contains(&score) => Ok(score),
        Some(score) => Err(format!("it answers {score}, which is outside {least} to {greatest}")),
        None => Err(format!("it answers {shown:?}, which is no score")),
    }
}

fn read(text: &str) -> Option<f64> {
    let bare = text.trim().trim_matches(['*', '`', ' ']);
    if let Ok(number) = bare.trim_end_matches('.').parse::<f64>() {
        return Some(number).filter(|number| number.is_finite());
    }
    let object: Value = serde_json::from_str(bare).ok()?;
    ["result", "score"].iter().find_map(|field| object.get(field)?.as_f64())
}

/// A service's `{"score": number}`.
pub fn score(answer: &Value) -> Result<f64, String> {
    let score = answer.get("score").and_then(Value::as_f64).filter(|score| score.is_finite());
    score.ok_or_else(|| "its answer has no number `score`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_read_or_refused() {
        for (text, expected) in [
            ("0.5", 0.5),
            (" 1.\n", 1.0),
            ("**0.25**", 0.25),
            ("It is short.\nScore: 0.75", 0.75),
            ("{\"result\": 0.5, \"steps\": []}", 0.5),
            ("Let me see\n{\"score\": 1}", 1.0),
            ("I think: no, wait: 0.1", 0.1),
        ] {
            assert_eq!(number(text, [0.0, 1.0]), Ok(expected), "{text}");
        }
        for text in ["", "good", "7/10", "1.5", "-0.1", "NaN", "inf", "0.5\nThat is all", "{\"points\": 1}", "1 or 0"] {
            assert!(number(text, [0.0, 1.0]).is_err(), "{text}");
        }
        assert_eq!(number("7", [1.0, 10.0]), Ok(7.0));
    }
}
