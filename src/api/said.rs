//! What an answer says: text, and calls of tools where they are read.

use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    domain::id,
    service::tools::{Said, ToolCall, ToolReader, ToolStyle},
};

/// A call that the model asks for.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ToolCallObject {
    /// Of the calls of one answer; only in streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
    /// `call_…`
    pub id: String,
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: String,
    pub function: CalledFunction,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CalledFunction {
    pub name: String,
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
                Said::Call(ToolCall { name, arguments }) => {
                    heard.calls.push(ToolCallObject {
                        index: Some(self.calls),
                        id: id::new("call_"),
                        kind: "function".to_owned(),
                        function: CalledFunction { name, arguments },
                    });
                    self.calls += 1;
                }
            }
        }
        if self.calls > 0 && heard.reason.as_deref() == Some("stop") {
            heard.reason = Some("tool_calls".to_owned());
        }
        heard
    }
}
