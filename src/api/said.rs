//! What an answer says: text, and calls of tools where they are read.

use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    domain::id,
    service::tools::{Said, ToolReader, ToolStyle},
};

/// A call that the model asks for. In a stream it comes in pieces: the first says which function, all of them bring more
/// of the arguments.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct ToolCallObject {
    /// Of the calls of one answer; only in streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
    /// `call_…`; in a stream with the first piece only, as the next two are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Always `function`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    pub function: CalledFunction,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct CalledFunction {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// JSON, as the model wrote it.
    pub arguments: String,
}

/// One answer as it comes in.
pub struct Speaker {
    reader: Option<ToolReader>,
    calls: u64,
}

/// What became certain.
pub struct Heard {
    pub text: String,
    /// Pieces of calls, at most one of each.
    pub calls: Vec<ToolCallObject>,
    /// `stop`, `length` or `tool_calls`, at the end.
    pub reason: Option<String>,
}

impl Speaker {
    /// Calls are read where their style is known.
    pub fn new(style: Option<ToolStyle>) -> Self {
        Self { reader: style.map(ToolReader::new), calls: 0 }
    }

    pub fn hear(&mut self, text: String, reason: Option<String>) -> Heard {
        let Some(reader) = &mut self.reader else { return Heard { text, calls: Vec::new(), reason } };
        let mut said = reader.push(&text);
        if reason.is_some() {
            said.extend(reader.finish());
        }
        let mut heard = Heard { text: String::new(), calls: Vec::new(), reason };
        for said in said {
            match said {
                Said::Text(text) => heard.text.push_str(&text),
                Said::Call(name) => {
                    heard.calls.push(ToolCallObject {
                        index: Some(self.calls),
                        id: Some(id::new("call_")),
                        kind: Some("function".to_owned()),
                        function: CalledFunction { name: Some(name), arguments: String::new() },
                    });
                    self.calls += 1;
                }
                Said::Arguments(more) => match heard.calls.last_mut() {
                    Some(call) => call.function.arguments.push_str(&more),
                    None => heard.calls.push(ToolCallObject {
                        index: self.calls.checked_sub(1),
                        function: CalledFunction { name: None, arguments: more },
                        ..ToolCallObject::default()
                    }),
                },
            }
        }
        if self.calls > 0 && heard.reason.as_deref() == Some("stop") {
            heard.reason = Some("tool_calls".to_owned());
        }
        heard
    }
}
