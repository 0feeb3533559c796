//! The base's chat template, run by minijinja with fuel and an output cap.

use std::io::{self, Write};

use minijinja::{
    Environment, Error, ErrorKind, Output, State, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde, Value as Jinja, ValueKind},
};
use regex::Regex;
use serde::Serialize;
use serde_json::Value;

use super::{TextError, ToolStyle};

/// Instructions of one rendering: thousands of turns in the longest templates that we know.
const FUEL: u64 = 20_000_000;
const MAX_OUTPUT: usize = 32 << 20;
const NAME: &str = "chat_template";

pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    takes_tools: bool,
    shows_calls: bool,
    tool_style: Option<ToolStyle>,
}

impl ChatTemplate {
    /// Compiles a template as transformers does: trimmed blocks, loop controls, Python's methods and JSON.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(format_as_python);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(failed)?;
        let template = environment.get_template(NAME).map_err(failed)?;
        let takes_tools = template.undeclared_variables(false).contains("tools");
        let tool_style = ToolStyle::of_template(source).filter(|_| takes_tools);
        let shows_calls = source.contains("tool_calls");
        let (bos_token, eos_token) = (bos_token.to_owned(), eos_token.to_owned());
        Ok(ChatTemplate { environment, bos_token, eos_token, takes_tools, shows_calls, tool_style })
    }

    /// Whether tools have a place in it.
    pub fn takes_tools(&self) -> bool {
        self.takes_tools
    }

    /// Whether it shows the calls that an assistant made before.
    pub fn shows_calls(&self) -> bool {
        self.shows_calls
    }

    /// How the model writes calls, where that is known.
    pub fn tool_style(&self) -> Option<ToolStyle> {
        self.tool_style
    }

    /// `messages` in OpenAI's shape; content parts of type text are joined to a string first, and arguments of calls
    /// are made objects, which is what templates expect.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let messages: Vec<Value> = messages.iter().map(as_templates_expect).collect();
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let values = context! {
            messages => Jinja::from(Serde(messages)),
            tools => tools.map(|tools| Jinja::from(Serde(tools.to_vec()))),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        let mut text = Capped(Vec::new());
        template.render_captured_to(values, &mut text).map_err(failed)?;
        String::from_utf8(text.0).map_err(|_| TextError::Template("the chat template's output is not utf-8".to_owned()))
    }
}

/// Takes as much as a prompt may be, and not more.
struct Capped(Vec<u8>);

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other(format!("the rendered chat is above the limit of {MAX_OUTPUT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn as_templates_expect(message: &Value) -> Value {
    let mut message = message.clone();
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(Ok(object)) = arguments.as_str().map(serde_json::from_str::<Value>)
        {
            *arguments = object;
        }
    }
    if let Some(content) = message.get_mut("content")
        && let Some(parts) = content.as_array()
    {
        let texts = parts.iter().filter(|part| part["type"] == "text").filter_map(|part| part["text"].as_str());
        *content = Value::String(texts.collect());
    }
    message
}

/// `{% generation %}` only marks what an assistant says, for masks that we make otherwise.
fn without_generation_tags(source: &str) -> String {
    let tag = Regex::new(r"\{%(-?)\s*(end)?generation\s*(-?)%\}").expect("the pattern is a constant");
    let replaced = tag.replace_all(source, |found: &regex::Captures| {
        let block = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {block} {}%}}", &found[1], &found[3])
    });
    replaced.into_owned()
}

fn raise_exception(message: String) -> Result<Jinja, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: String) -> Result<String, Error> {
    use std::fmt::Write;
    let mut text = String::new();
    match write!(text, "{}", chrono::Local::now().format(&format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(Error::new(ErrorKind::InvalidOperation, format!("{format:?} is not a format of time"))),
    }
}

/// Python prints these words with a capital.
fn format_as_python(out: &mut Output, state: &mut State, value: &Jinja) -> Result<(), Error> {
    if value.is_none() {
        return Ok(out.write_str("None")?);
    }
    match (value.kind(), value.is_true()) {
        (ValueKind::Bool, true) => Ok(out.write_str("True")?),
        (ValueKind::Bool, false) => Ok(out.write_str("False")?),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`, without the escapes for HTML that Jinja adds.
fn tojson(value: &Jinja, kwargs: Kwargs) -> Result<String, Error> {
    let indent = kwargs.get::<Option<usize>>("indent")?;
    let _: Option<Jinja> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Spaced)),
        Some(n) => {
            let spaces = vec![b' '; n.min(16)];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, pretty))
        }
    };
    let bad = |what: String| Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    written.map_err(|error| bad(error.to_string()))?;
    String::from_utf8(json).map_err(|error| bad(error.to_string()))
}

/// Python's separators: `, ` and `: `.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// What went wrong in the words of whoever raised it, with the place.
fn failed(error: Error) -> TextError {
    // Of a writer that refuses, the engine's own words only say that it did.
    let refused = std::error::Error::source(&error).filter(|_| error.kind() == ErrorKind::WriteFailure);
    let detail = match (refused, error.detail()) {
        (Some(cause), _) => cause.to_string(),
        (None, Some(detail)) => detail.to_owned(),
        (None, None) => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => TextError::Template(format!("chat template, line {line}: {detail}")),
        None => TextError::Template(format!("chat template: {detail}")),
    }
}
