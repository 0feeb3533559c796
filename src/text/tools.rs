//! Calls of tools as models write them.

use serde::Deserialize;
use serde_json::{Value, json};

/// How a family of models writes a call; its chat template shows which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolStyle {
    /// `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`, after text or not (Hermes, Qwen, SmolLM3).
    Tagged,
    /// The whole answer is `{"name": …, "parameters": {…}}` (Llama 3).
    Bare,
}

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

impl ToolStyle {
    pub fn of_template(source: &str) -> Option<Self> {
        if source.contains(OPEN) {
            Some(Self::Tagged)
        } else if source.contains(r#""parameters": dictionary"#) || source.contains("<|python_tag|>") {
            Some(Self::Bare)
        } else {
            None
        }
    }

    /// What stands before the JSON of a call, and behind it.
    fn around(self) -> (&'static str, &'static str) {
        match self {
            Self::Tagged => ("<tool_call>", "</tool_call>"),
            Self::Bare => ("", ""),
        }
    }

    /// The grammar, in Lark, of answers that hold so many calls of these functions. Each has its own `%json`, so that
    /// references inside its schema find their place.
    pub(super) fn lark(self, calls: Calls, functions: &[(String, Value)]) -> String {
        let quoted = |text: &str| json!(text).to_string();
        let (open, close) = self.around();
        let (field, line) = match self {
            Self::Tagged => ("arguments", "\n"),
            Self::Bare => ("parameters", ""),
        };
        let shape = match (self, calls) {
            (_, Calls::One) | (Self::Bare, Calls::Several) => "start: whole",
            (Self::Tagged, Calls::Several) => r#"start: whole ("\n" whole)*"#,
            (Self::Tagged, Calls::Any) => "start: (before call)* text",
            (Self::Tagged, Calls::AtMostOne) => "start: text | before call",
            (Self::Bare, Calls::Any | Calls::AtMostOne) => "start: call | plain",
        };
        let mut lark = format!(
            "{shape}\nwhole: {open} call\nbefore[lazy]: /(.|\\n)*{OPEN}/\ntext: /(.|\\n)*/\n\
             plain: /([^{{](.|\\n)*)?/\n",
            open = quoted(open),
        );
        for (i, (name, schema)) in functions.iter().enumerate() {
            let before = quoted(&format!("{line}{{\"name\": {}, \"{field}\": ", json!(name)));
            let after = quoted(&format!("}}{line}{close}"));
            lark += &format!("function_{i}: {before} arguments_{i} {after}\narguments_{i}: %json {schema}\n");
        }
        let all: Vec<String> = (0..functions.len()).map(|i| format!("function_{i}")).collect();
        lark + &format!("call: {}\n", all.join(" | "))
    }
}

/// How many calls an answer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// And nothing else.
    One,
    /// One or more, and nothing else.
    Several,
    /// Text, then a call or none.
    AtMostOne,
    /// Text and calls.
    Any,
}

/// A call that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    pub name: String,
    /// JSON.
    pub arguments: String,
}

/// What a text turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    Text(String),
    Call(ToolCall),
}

/// Reads calls out of a text that comes in pieces. What looks like a call and is none stays text.
#[derive(Debug)]
pub struct ToolReader {
    style: ToolStyle,
    held: String,
    /// Something other than space was said already.
    has_spoken: bool,
}

#[derive(Deserialize)]
struct Written {
    name: String,
    #[serde(alias = "parameters")]
    arguments: Value,
}

fn call(text: &str) -> Option<ToolCall> {
    let written: Written = serde_json::from_str(text.trim()).ok()?;
    written.arguments.is_object().then(|| ToolCall { name: written.name, arguments: written.arguments.to_string() })
}

impl ToolReader {
    pub fn new(style: ToolStyle) -> Self {
        Self { style, held: String::new(), has_spoken: false }
    }

    /// What is certain now.
    pub fn push(&mut self, text: &str) -> Vec<Said> {
        self.held.push_str(text);
        let mut said = Vec::new();
        match self.style {
            ToolStyle::Tagged => self.tagged(&mut said),
            ToolStyle::Bare => {
                let start = self.held.trim_start();
                if self.has_spoken || !(start.is_empty() || start.starts_with('{')) {
                    self.say(self.held.len(), &mut said);
                }
            }
        }
        said
    }

    /// The rest, when nothing more comes.
    pub fn finish(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        match call(&self.held).filter(|_| self.style == ToolStyle::Bare) {
            Some(call) => said.push(Said::Call(call)),
            None => self.say(self.held.len(), &mut said),
        }
        self.held.clear();
        said
    }

    fn tagged(&mut self, said: &mut Vec<Said>) {
        loop {
            let Some(open) = self.held.find(OPEN) else {
                // The end may be the beginning of a tag, or space before one.
                let certain = self.held.trim_end().len();
                let certain = (0..certain).rev().take(OPEN.len() - 1).filter(|at| self.held.is_char_boundary(*at));
                let partial = certain.filter(|at| OPEN.starts_with(self.held[*at..].trim_end())).min();
                let end = partial.unwrap_or(self.held.trim_end().len());
                let end = self.held[..end].trim_end().len();
                return self.say(end, said);
            };
            let Some(length) = self.held[open..].find(CLOSE) else {
                let before = self.held[..open].trim_end().len();
                return self.say(before, said);
            };
            let close = open + length;
            match call(&self.held[open + OPEN.len()..close]) {
                Some(call) => {
                    let before = self.held[..open].trim_end().len();
                    self.say(before, said);
                    said.push(Said::Call(call));
                    self.held.drain(..close + CLOSE.len() - before);
                }
                None => self.say(close + CLOSE.len(), said),
            }
        }
    }

    /// The first `n` bytes are text.
    fn say(&mut self, n: usize, said: &mut Vec<Said>) {
        let text: String = self.held.drain(..n).collect();
        self.has_spoken |= !text.trim().is_empty();
        if !text.is_empty() {
            said.push(Said::Text(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All of it, neighbouring texts joined.
    fn read(style: ToolStyle, pieces: &[&str]) -> Vec<Said> {
        let mut reader = ToolReader::new(style);
        let mut all: Vec<Said> = Vec::new();
        let said: Vec<Said> = pieces.iter().flat_map(|piece| reader.push(piece)).collect();
        for said in said.into_iter().chain(reader.finish()) {
            match (all.last_mut(), said) {
                (Some(Said::Text(before)), Said::Text(text)) => before.push_str(&text),
                (_, said) => all.push(said),
            }
        }
        all
    }

    fn call(name: &str, arguments: &str) -> Said {
        Said::Call(ToolCall { name: name.to_owned(), arguments: arguments.to_owned() })
    }

    const TWO: &str = "Let me see. <tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\": 1, \"a\": \"é\"}}\n</tool_call>\n\
                       <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";

    #[test]
    fn tagged_calls_are_read_after_text() {
        let expected = [Said::Text("Let me see.".into()), call("f", r#"{"b":1,"a":"é"}"#), call("g", "{}")];
        assert_eq!(read(ToolStyle::Tagged, &[TWO]), expected);
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in ["a <tool_call>nothing</tool_call> b", "a <tool_call>\n{\"name\": \"f\"", "1 < 2 <tool", "  ", "{}"]
        {
            assert_eq!(read(ToolStyle::Tagged, &[text]), [Said::Text(text.to_owned())], "{text}");
        }
        for text in
            [r#"{"name": "f"}"#, r#"say {"name": "f", "parameters": {}}"#, "{", r#"{"name": "f", "parameters": 1}"#]
        {
            assert_eq!(read(ToolStyle::Bare, &[text]), [Said::Text(text.to_owned())], "{text}");
        }
    }

    #[test]
    fn a_bare_call_is_the_whole_answer() {
        assert_eq!(
            read(ToolStyle::Bare, &["\n{\"name\": \"f\", ", "\"parameters\": {\"a\": [1]}}"]),
            [call("f", r#"{"a":[1]}"#)]
        );
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_gives(cuts in prop::collection::vec(0usize..TWO.len(), 0..8)) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|at| TWO.is_char_boundary(*at)).collect();
            cuts.sort_unstable();
            cuts.push(TWO.len());
            let (mut pieces, mut start) = (Vec::new(), 0);
            for cut in cuts {
                pieces.push(&TWO[start..cut]);
                start = cut;
            }
            prop_assert_eq!(read(ToolStyle::Tagged, &pieces), read(ToolStyle::Tagged, &[TWO]));
        }
    }
}
