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

/// What a text turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    Text(String),
    /// A call of this function begins.
    Call(String),
    /// More of the last call's arguments, as the model wrote them: JSON.
    Arguments(String),
}

/// Reads calls out of a text that comes in pieces. A call has begun once the function's name and the beginning of its
/// arguments are there; what does not come so far stays text.
#[derive(Debug)]
pub struct ToolReader {
    style: ToolStyle,
    held: String,
    place: Place,
    /// Something other than space was said already.
    has_spoken: bool,
}

/// Where the reader stands.
#[derive(Debug)]
enum Place {
    Text,
    Arguments(Object),
    /// In a call behind its arguments: nothing there is said.
    Behind,
}

/// How much of a JSON object is still open.
#[derive(Debug, Default)]
struct Object {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Object {
    /// Where it ends, if it does in this text.
    fn end(&mut self, text: &str) -> Option<usize> {
        for (at, byte) in text.bytes().enumerate() {
            match (self.in_string, byte) {
                (true, _) if self.is_escaped => self.is_escaped = false,
                (true, b'\\') => self.is_escaped = true,
                (_, b'"') => self.in_string = !self.in_string,
                (false, b'{' | b'[') => self.depth += 1,
                (false, b'}' | b']') => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            if self.depth == 0 {
                return Some(at + 1);
            }
        }
        None
    }
}

#[derive(Deserialize)]
struct Written {
    name: String,
    #[serde(alias = "parameters")]
    arguments: Value,
}

/// A whole call, its fields in any order.
fn call(text: &str) -> Option<[Said; 2]> {
    let Written { name, arguments } = serde_json::from_str(text.trim()).ok()?;
    arguments.is_object().then(|| [Said::Call(name), Said::Arguments(arguments.to_string())])
}

/// The name of a call that begins here, and where the object of its arguments does.
fn begun(text: &str) -> Option<(String, usize)> {
    let after = |text, mark: &str| str::trim_start(text).strip_prefix(mark);
    let written = after(after(after(text, "{")?, "\"name\"")?, ":")?;
    let mut names = serde_json::Deserializer::from_str(written).into_iter::<String>();
    let name = names.next()?.ok()?;
    let rest = after(&written[names.byte_offset()..], ",")?;
    let rest = after(rest, "\"arguments\"").or_else(|| after(rest, "\"parameters\""))?;
    let arguments = after(rest, ":")?.trim_start();
    arguments.starts_with('{').then(|| (name, text.len() - arguments.len()))
}

impl ToolReader {
    pub fn new(style: ToolStyle) -> Self {
        Self { style, held: String::new(), place: Place::Text, has_spoken: false }
    }

    /// What is certain now.
    pub fn push(&mut self, text: &str) -> Vec<Said> {
        self.held.push_str(text);
        let mut said = Vec::new();
        while self.advance(&mut said) {}
        said
    }

    /// The rest, when nothing more comes.
    pub fn finish(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        if let Place::Text = self.place {
            match call(&self.held).filter(|_| self.style == ToolStyle::Bare) {
                Some(call) => said.extend(call),
                None => self.say(self.held.len(), &mut said),
            }
        }
        self.held.clear();
        said
    }

    /// Goes on to the next place; false where that needs more text.
    fn advance(&mut self, said: &mut Vec<Said>) -> bool {
        match (&mut self.place, self.style) {
            (Place::Text, ToolStyle::Tagged) => self.tagged(said),
            (Place::Text, ToolStyle::Bare) => {
                let start = self.held.trim_start();
                if self.has_spoken || !(start.is_empty() || start.starts_with('{')) {
                    self.say(self.held.len(), said);
                }
                self.begin(0, said)
            }
            (Place::Arguments(object), _) => {
                let end = object.end(&self.held);
                let more: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
                said.extend(Some(more).filter(|more| !more.is_empty()).map(Said::Arguments));
                if end.is_some() {
                    self.place = Place::Behind;
                }
                end.is_some()
            }
            (Place::Behind, ToolStyle::Tagged) => {
                let Some(close) = self.held.find(CLOSE) else { return false };
                self.held.drain(..close + CLOSE.len());
                self.place = Place::Text;
                true
            }
            (Place::Behind, ToolStyle::Bare) => {
                self.held.clear();
                false
            }
        }
    }

    fn tagged(&mut self, said: &mut Vec<Said>) -> bool {
        let Some(open) = self.held.find(OPEN) else {
            // The end may be the beginning of a tag, or space before one.
            let certain = self.held.trim_end().len();
            let certain = (0..certain).rev().take(OPEN.len() - 1).filter(|at| self.held.is_char_boundary(*at));
            let partial = certain.filter(|at| OPEN.starts_with(self.held[*at..].trim_end())).min();
            let end = partial.unwrap_or(self.held.trim_end().len());
            let end = self.held[..end].trim_end().len();
            self.say(end, said);
            return false;
        };
        let before = self.held[..open].trim_end().len();
        let inner = open + OPEN.len();
        let Some(length) = self.held[inner..].find(CLOSE) else {
            self.say(before, said);
            return self.begin(inner - before, said);
        };
        let close = inner + length;
        if begun(&self.held[inner..close]).is_some() {
            self.say(before, said);
            return self.begin(inner - before, said);
        }
        match call(&self.held[inner..close]) {
            Some(call) => {
                self.say(before, said);
                said.extend(call);
                self.held.drain(..close + CLOSE.len() - before);
            }
            None => self.say(close + CLOSE.len(), said),
        }
        true
    }

    /// Begins the call that stands at `at`, if it is there so far.
    fn begin(&mut self, at: usize, said: &mut Vec<Said>) -> bool {
        let Some((name, arguments)) = begun(&self.held[at..]) else { return false };
        said.push(Said::Call(name));
        self.held.drain(..at + arguments);
        self.place = Place::Arguments(Object::default());
        true
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

    /// All of it, neighbours joined.
    fn read(style: ToolStyle, pieces: &[&str]) -> Vec<Said> {
        let mut reader = ToolReader::new(style);
        let mut all: Vec<Said> = Vec::new();
        let said: Vec<Said> = pieces.iter().flat_map(|piece| reader.push(piece)).collect();
        for said in said.into_iter().chain(reader.finish()) {
            match (all.last_mut(), said) {
                (Some(Said::Text(before)), Said::Text(more)) => before.push_str(&more),
                (Some(Said::Arguments(before)), Said::Arguments(more)) => before.push_str(&more),
                (_, said) => all.push(said),
            }
        }
        all
    }

    fn call(name: &str, arguments: &str) -> [Said; 2] {
        [Said::Call(name.to_owned()), Said::Arguments(arguments.to_owned())]
    }

    fn text(text: &str) -> Said {
        Said::Text(text.to_owned())
    }

    const TWO: &str = "Let me see. <tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\": [1], \"a\": \"é}\\\"\"}}\n</tool_call>\n\
                       <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";

    #[test]
    fn tagged_calls_are_read_after_text() {
        let calls = [call("f", r#"{"b": [1], "a": "é}\""}"#), call("g", "{}")].concat();
        assert_eq!(read(ToolStyle::Tagged, &[TWO]), [vec![text("Let me see.")], calls].concat());
        // Its fields in another order are known only when all of it is there.
        let turned = "<tool_call>{\"arguments\": {\"a\": 1}, \"name\": \"f\"}</tool_call> and";
        assert_eq!(read(ToolStyle::Tagged, &[turned]), [call("f", r#"{"a":1}"#).to_vec(), vec![text(" and")]].concat());
    }

    #[test]
    fn arguments_come_as_they_are_written() {
        let pieces = [
            "<tool_call>\n{\"name\": \"f\", \"arguments\": ",
            "{\"a\"",
            ": \"}",
            "\"",
            "}",
            "}\n</tool",
            "_call>",
            "!",
        ];
        let mut reader = ToolReader::new(ToolStyle::Tagged);
        let more = |text: &str| vec![Said::Arguments(text.to_owned())];
        let [name, _] = call("f", "");
        let expected = [
            vec![],
            vec![name, more("{\"a\"").remove(0)],
            more(": \"}"),
            more("\""),
            more("}"),
            vec![],
            vec![],
            vec![text("!")],
        ];
        assert_eq!(pieces.map(|piece| reader.push(piece)), expected);
        assert_eq!(reader.finish(), []);
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for said in ["a <tool_call>nothing</tool_call> b", "a <tool_call>\n{\"name\": \"f\"", "1 < 2 <tool", "  ", "{}"]
        {
            assert_eq!(read(ToolStyle::Tagged, &[said]), [text(said)], "{said}");
        }
        for said in
            [r#"{"name": "f"}"#, r#"say {"name": "f", "parameters": {}}"#, "{", r#"{"name": "f", "parameters": 1}"#]
        {
            assert_eq!(read(ToolStyle::Bare, &[said]), [text(said)], "{said}");
        }
    }

    #[test]
    fn a_bare_call_is_the_whole_answer() {
        let pieces = ["\n{\"name\": \"f\", ", "\"parameters\": {\"a\": [1]}}"];
        assert_eq!(read(ToolStyle::Bare, &pieces), call("f", r#"{"a": [1]}"#));
        let turned = [r#"{"parameters": {"a": [1]}, "#, r#""name": "f"}"#];
        assert_eq!(read(ToolStyle::Bare, &turned), call("f", r#"{"a":[1]}"#));
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
